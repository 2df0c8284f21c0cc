r"""Stage 6: the demo's drafter learns from the demo target's own answers.

    python train_drafter.py --model ../../flash_mlx/demo/target --answers runs/answers.jsonl \
        --output runs/drafter --train '{"iterations": 700}'

The target's states are computed once, in batches, and kept in memory at 16 bits: the two answers
about a picture share its rows. Training itself is the library's (`flash_mlx.train`).

Shapes:
    B: sequences.    T: rows of a sequence.    D: hidden size.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flash_mlx  # noqa: F401  (binds a fast BLAS before MLX is imported)
import mlx.core as mx
import numpy as np

from answers import moments_of, picture_of
from clip_language import VIDEO_PROMPTS
from flash_mlx.checkpoint import load_model
from flash_mlx.draft import FlashModel
from flash_mlx.draft.drafter import FlashDrafter
from flash_mlx.processing import make_prompt
from flash_mlx.targets import LoadedTarget, load_target
from flash_mlx.train import Batch, Example, Teacher, TrainConfig, Trainer, TrainingCallback
from flash_mlx.train.initial import BEST_START, STARTS, drafter_config, new_model, propose_frequent
from flash_mlx.train.validate import BEST_BY, mean_acceptance_length
from words import BRIEF_PROMPTS, CAPTION_PROMPTS
from model import Llava, TextShape, VisionShape

PROMPT_FAMILIES = ("captions", "questions")
TUNING = 31_000_000  # scenes on which training is watched; never reported


def family_of(prompt: str) -> str:
    """One of `PROMPT_FAMILIES`; lists, and what happens in a clip, are questions too."""
    return PROMPT_FAMILIES[prompt not in CAPTION_PROMPTS + BRIEF_PROMPTS + VIDEO_PROMPTS]


def read_examples(
    loaded: LoadedTarget, file: Path, families: Sequence[str] = PROMPT_FAMILIES
) -> list[list[Example]]:
    """The answers, grouped by scene or clip: those of a group have the same prompt and pictures."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if family_of(row["prompt"]) in families]
    groups = []

    def asked(row: dict[str, Any]) -> tuple[bool, int, str]:
        return "clip" in row, row["clip" if "clip" in row else "scene"], row["prompt"]

    for (is_clip, seed, prompt), group in itertools.groupby(sorted(rows, key=asked), key=asked):
        made = make_prompt(loaded, prompt, moments_of(seed) if is_clip else [picture_of(seed)])
        groups.append([Example(made, tuple(row["answer"])) for row in group])
    return groups


def batched_target(loaded: LoadedTarget) -> Llava:
    """The same weights in the form that reads several answers about a picture at once."""
    config = loaded.config["text_config"]
    text = TextShape(num_hidden_layers=config["num_hidden_layers"])
    weights = mx.load(str(loaded.path / "model.safetensors"))
    patch = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    weights[patch] = weights[patch].transpose(0, 2, 3, 1)
    model = Llava(VisionShape(), text)
    model.load_weights([(k, v.astype(mx.float32)) for k, v in weights.items()])
    return model


def _alike(groups: list[list[Example]], size: int) -> Iterator[list[list[Example]]]:
    """Batches of at most `size` neighbours with equally many pictures."""
    for _, some in itertools.groupby(groups, key=lambda g: len(g[0].prompt.image_spans)):
        left = list(some)
        yield from (left[start : start + size] for start in range(0, len(left), size))


def compute_features(
    model: Llava, groups: list[list[Example]], size: int = 8
) -> dict[int, np.ndarray]:
    """The LM head's input at every row of each example, [T, D] float16, by the example's `id`."""
    features: dict[int, np.ndarray] = {}
    ordered = sorted(
        (g for g in groups if len(g) == 2),
        key=lambda g: (len(g[0].prompt.image_spans), max(len(e.tokens) for e in g)),
    )
    for batch in _alike(ordered, size):
        spans = batch[0][0].prompt.image_spans
        stop = spans[-1][1]
        pixels = mx.concatenate([group[0].prompt.inputs["pixel_values"] for group in batch])
        visual = model.visual_tokens(pixels.transpose(0, 2, 3, 1))
        visual = visual.reshape(len(batch), len(spans), *visual.shape[1:])
        before = mx.array([group[0].tokens[:stop] for group in batch])
        shared = model.language_model.model.embed_tokens(before)
        for number, (first, last) in enumerate(spans):
            shared[:, first:last] = visual[:, number]
        longest = max(len(e.tokens) for group in batch for e in group) - stop
        tokens = np.zeros((len(batch), 2, longest), np.int32)
        for b, group in enumerate(batch):
            for c, example in enumerate(group):
                tokens[b, c, : len(example.tokens) - stop] = example.tokens[stop:]
        positions = mx.broadcast_to(mx.arange(stop), (len(batch), stop))
        before_hidden, hidden = model.hidden(shared, positions, mx.array(tokens), stop)
        head, tail = np.array(before_hidden.astype(mx.float16)), np.array(hidden.astype(mx.float16))
        for b, group in enumerate(batch):
            for c, example in enumerate(group):
                rows = len(example.tokens) - stop
                features[id(example)] = np.concatenate([head[b], tail[b, c, :rows]])
    return features


class Printer(TrainingCallback):
    def on_train_loss_report(self, train_info: dict[str, object]) -> None:
        print(json.dumps(train_info), flush=True)

    def on_val_loss_report(self, val_info: dict[str, object]) -> None:
        print(json.dumps(val_info), flush=True)


def measured(loaded: LoadedTarget, model: FlashModel, scenes: int) -> dict[str, float]:
    """Mean acceptance length of the decoding loop on tuning scenes, at temperature 0 and 1."""
    drafter = FlashDrafter(model, loaded.target.embed, loaded.target.lm_head)
    prompts = [
        make_prompt(loaded, CAPTION_PROMPTS[i % 5], [picture_of(TUNING + i)]) for i in range(scenes)
    ]
    return {
        name: round(
            mean_acceptance_length(
                loaded.target,
                drafter,
                prompts,
                temperature=temperature,
                max_tokens=200,
                stop_ids=loaded.eos_ids,
            ),
            3,
        )
        for name, temperature in ((BEST_BY, 0.0), (f"{BEST_BY}_t1", 1.0))
    }


def first_model(loaded: LoadedTarget, args: argparse.Namespace, seed: int) -> FlashModel:
    """What training begins with: a drafter that is there, or a new one as `flash-mlx train` has."""
    if args.init_from:
        return load_model(args.init_from)
    start = args.init or BEST_START
    return new_model(loaded, drafter_config(loaded, start, args.config), start, seed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--init-from", type=Path, help="a drafter to go on with; default: none")
    begin.add_argument("--init", choices=STARTS, help=f"default: {BEST_START}")
    parser.add_argument(
        "--config", type=json.loads, default={}, help="settings of a new drafter, as JSON"
    )
    parser.add_argument(
        "--train", type=json.loads, default={}, help="settings of TrainConfig, as JSON"
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        choices=PROMPT_FAMILIES,
        default=PROMPT_FAMILIES,
        help="learn from answers to these alone",
    )
    parser.add_argument("--limit", type=int, default=0, help="scenes used; 0: all")
    parser.add_argument("--scenes", type=int, default=8, help="scenes of each validation")
    return parser.parse_args()


def main() -> None:
    args = parse()
    loaded = load_target(args.model)
    groups = read_examples(loaded, args.answers, args.prompts)[: args.limit or None]
    cache = compute_features(batched_target(loaded), groups)
    examples = [example for group in groups for example in group if id(example) in cache]

    def features(batch: Batch) -> mx.array:
        rows = [cache[id(example)] for example in batch.examples]
        padded = np.zeros((len(rows), batch.tokens.shape[1], rows[0].shape[1]), np.float32)
        for line, row in zip(padded, rows, strict=True):
            line[: len(row)] = row
        return mx.array(padded)

    target = loaded.target
    config = TrainConfig(**args.train)
    model = first_model(loaded, args, config.seed)
    if not args.init_from:  # which has chosen already
        propose_frequent(model, (example.answer for example in examples), loaded.eos_ids)

    def validate(averaged: FlashModel) -> Mapping[str, float]:
        return measured(loaded, averaged, args.scenes)

    trainer = Trainer(
        model,
        Teacher(features, target.embed, target.lm_head),
        examples,
        args.output,
        config,
        target_info={"model_type": loaded.model_type, "name": "demo"},
        callback=Printer(),
        validate=validate,
    )
    if args.resume:
        trainer.resume()
    trainer.run()


if __name__ == "__main__":
    main()
