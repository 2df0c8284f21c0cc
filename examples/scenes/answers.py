"""Stage 5: the demo target answers questions about new scenes, for its drafter to learn from.

    python answers.py --model ../../flash_mlx/demo/target --output runs/answers.jsonl --scenes 900

Each scene is asked one thing; the answer is generated twice, greedily and at temperature 1. Scenes
of one batch share a prompt, so that their rows have equal length and one padded-free pass serves
all. With `--clips`, clips are asked in their place.

Shapes:
    B: sequences of a batch.    T: prompt rows.    D: hidden size.    V: vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flash_mlx  # noqa: F401  (binds a fast BLAS before MLX is imported)
import mlx.core as mx
import numpy as np
from mlx_vlm.models.cache import make_prompt_cache
from PIL import Image

from clip_language import EVENTS_PROMPTS, STEPS_PROMPTS, VIDEO_PROMPTS, clip_conversation
from clips import draw_clip, moments
from flash_mlx.processing import make_prompt
from flash_mlx.targets import LoadedTarget, load_target
from language import question
from words import BRIEF_PROMPTS, CAPTION_PROMPTS, LIST_PROMPTS
from render import render
from world import draw_scene

SPLIT = 50_000_000
KINDS = ("caption", "caption", "caption", "question", "question", "list", "brief")
CLIP_SPLIT = 90_000_000
CLIP_KINDS = ("caption", "caption", "caption", "question", "events", "steps")
_PROMPTS = {"caption": CAPTION_PROMPTS, "brief": BRIEF_PROMPTS, "list": LIST_PROMPTS}
_CLIP_PROMPTS = {"caption": VIDEO_PROMPTS, "events": EVENTS_PROMPTS, "steps": STEPS_PROMPTS}


def picture_of(seed: int) -> Image.Image:
    """The picture of a scene."""
    return Image.fromarray(render(draw_scene(random.Random(seed)), seed)[0])


def moments_of(seed: int) -> list[Image.Image]:
    """The pictures of a clip's moments."""
    return [Image.fromarray(each) for each in moments(draw_clip(random.Random(seed)), seed)[0]]


@dataclass(frozen=True)
class Subject:
    """What is asked about: scenes or clips, by number.

    Attributes:
        name: Of the number, in a row of answers.
        first: The first number.
        kinds: Of conversations.
        prompts: By kind; those of a kind that is missing are questions.
        pictures: Of a number.
        question: Of a number.
    """

    name: str
    first: int
    kinds: tuple[str, ...]
    prompts: dict[str, tuple[str, ...]]
    pictures: Callable[[int], list[Image.Image]]
    question: Callable[[int], str]


def scene_question(seed: int) -> str:
    rng = random.Random(seed)
    return question(draw_scene(rng), rng)[0]


def clip_question(seed: int) -> str:
    rng = random.Random(seed)
    return clip_conversation(draw_clip(rng), "question", rng)[0]


SCENES = Subject("scene", SPLIT, KINDS, _PROMPTS, lambda seed: [picture_of(seed)], scene_question)
CLIPS = Subject("clip", CLIP_SPLIT, CLIP_KINDS, _CLIP_PROMPTS, moments_of, clip_question)


def draw_batch(
    subject: Subject, rng: random.Random, first: int, size: int
) -> tuple[list[list[Image.Image]], list[str]]:
    """Pictures of numbers first, ... and their prompts, alike unless they are questions."""
    kind = rng.choice(subject.kinds)
    shared = rng.choice(subject.prompts[kind]) if kind in subject.prompts else ""
    seeds = range(first, first + size)
    pictures = [subject.pictures(seed) for seed in seeds]
    return pictures, [shared or subject.question(seed) for seed in seeds]


def embed_prompts(
    loaded: LoadedTarget, prompts: list[str], pictures: list[list[Image.Image]]
) -> mx.array:
    """Input embeddings [B, T, D] of prompts that have the same number of rows."""
    model: Any = loaded.target.model
    made = [make_prompt(loaded, p, shown) for p, shown in zip(prompts, pictures, strict=True)]
    pixels = mx.concatenate([prompt.inputs["pixel_values"] for prompt in made])
    hidden = model.vision_tower(pixels.transpose(0, 2, 3, 1), output_hidden_states=True)[-1][-1][
        :, 1:
    ]
    visual = model.multi_modal_projector(hidden)
    visual = visual.reshape(len(made), -1, *visual.shape[1:])
    rows = loaded.target.embed(mx.array([prompt.tokens for prompt in made]))
    for number, (first, last) in enumerate(made[0].image_spans):
        rows[:, first:last] = visual[:, number]
    return rows


def decode_batch(
    loaded: LoadedTarget, embeddings: mx.array, temperatures: np.ndarray, max_tokens: int, seed: int
) -> list[list[int]]:
    """Continue B prompts, each at its own temperature; a stop token is the last id of its text."""
    decoder: Any = loaded.target.model.language_model.model
    cache = make_prompt_cache(loaded.target.model.language_model)
    stop = loaded.eos_ids[0]
    heat = mx.array(temperatures, dtype=mx.float32)[:, None]
    key = mx.random.key(seed)
    hidden = decoder(None, inputs_embeds=embeddings, cache=cache)[:, -1]
    columns: list[np.ndarray] = []
    done = np.zeros(len(temperatures), bool)
    while len(columns) < max_tokens and not done.all():
        key, subkey = mx.random.split(key)
        logits = loaded.target.lm_head(hidden)
        noise = mx.random.gumbel(logits.shape, key=subkey)
        tokens = mx.argmax(logits + heat * noise, axis=-1)
        columns.append(np.array(tokens))
        done |= columns[-1] == stop
        hidden = decoder(tokens[:, None], cache=cache)[:, -1]
    rows = np.stack(columns, axis=1).tolist()
    return [row[: row.index(stop) + 1] if stop in row else row for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=900)
    parser.add_argument("--clips", action="store_true", help="ask about clips, not scenes")
    parser.add_argument("--first", type=int, help="first number; default: that of the split")
    parser.add_argument("--batch", type=int, default=24)
    args = parser.parse_args()
    loaded = load_target(args.model)
    subject = CLIPS if args.clips else SCENES
    start = subject.first if args.first is None else args.first
    rng = random.Random(start)
    with args.output.open("a") as file:
        for first in range(start, start + args.scenes, args.batch):
            pictures, prompts = draw_batch(subject, rng, first, args.batch)
            lengths = [
                len(make_prompt(loaded, p, shown))
                for p, shown in zip(prompts, pictures, strict=True)
            ]
            for length in sorted(set(lengths)):
                chosen = [i for i, n in enumerate(lengths) if n == length]
                embeddings = embed_prompts(
                    loaded, [prompts[i] for i in chosen], [pictures[i] for i in chosen]
                )
                both = mx.concatenate([embeddings, embeddings])
                heat = np.repeat([0.0, 1.0], len(chosen))
                answers = decode_batch(loaded, both, heat, 256, first + length)
                for j, answer in enumerate(answers):
                    i = chosen[j % len(chosen)]
                    row = {
                        subject.name: first + i,
                        "prompt": prompts[i],
                        "temperature": float(heat[j]),
                        "answer": answer,
                    }
                    file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
