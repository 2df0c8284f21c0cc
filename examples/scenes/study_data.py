"""What all runs of the study share: answers with the target's states, and held-out prompts.

The target reads all answers once. What it computed is kept in a file that is mapped into memory,
so that a restarted study begins at once.

Shapes:
    R: rows of all examples, one after the other.    B: sequences of a batch.
    T: rows of a sequence.    D: hidden size.    L: tapped layers.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import flash_mlx  # noqa: F401  (binds a fast BLAS before MLX is imported)
import mlx.core as mx
import numpy as np
import numpy.typing as npt

from answers import CLIPS, SCENES, clip_question, scene_question
from clip_language import STEPS_PROMPTS, VIDEO_PROMPTS
from evaluate import HELD_OUT
from flash_mlx.processing import make_prompt
from flash_mlx.prompt import Prompt
from flash_mlx.targets import LoadedTarget
from flash_mlx.targets.taps import TappedTarget
from flash_mlx.train import Batch, Example, Teacher
from flash_mlx.train.teacher import read_examples as read_by_target
from language import brief, caption, listing, question
from words import BRIEF_PROMPTS, CAPTION_PROMPTS, LIST_PROMPTS
from train_drafter import TUNING, batched_target, compute_features, read_examples
from world import draw_scene


@dataclass(frozen=True, eq=False)
class Examples:
    """The answers with the target's states.

    Attributes:
        examples: Without pixels: the states are here.
        starts: [examples + 1] int64, each example's first row.
        hidden: [R, D] float16, the LM head's inputs; with taps [R, (L + 1) D], the inputs of the
            tapped layers first.
        visual: [pictures, N, D] float16, the target's embeddings of each picture; examples come
            in pairs about the same ones.
    """

    examples: list[Example]
    starts: npt.NDArray[np.int64]
    hidden: npt.NDArray[np.float16]
    visual: npt.NDArray[np.float16]

    def teacher(self, loaded: LoadedTarget) -> Teacher:
        """The target as the trainer asks it, from what is kept."""
        place = {id(example): i for i, example in enumerate(self.examples)}

        def hidden(batch: Batch) -> mx.array:
            size = self.hidden.shape[1]
            padded = np.zeros((len(batch.examples), batch.tokens.shape[1], size), np.float32)
            for line, example in zip(padded, batch.examples, strict=True):
                rows = self.rows(place[id(example)])
                line[: len(rows)] = rows
            return mx.array(padded)

        return Teacher(hidden, loaded.target.embed, loaded.target.lm_head)

    def rows(self, number: int) -> npt.NDArray[np.float16]:
        """[T, D] of example `number`."""
        return self.hidden[self.starts[number] : self.starts[number + 1]]


def load_examples(loaded: LoadedTarget, answers: Path, folder: Path) -> Examples:
    """Return the examples; the first time, the target computes their states."""
    if not (folder / "examples.json").exists():
        _compute(loaded, answers, folder)
    rows = json.loads((folder / "examples.json").read_text())
    examples = [
        Example(
            Prompt(tuple(row["prompt"]), tuple((a, b) for a, b in row["spans"])),
            tuple(row["answer"]),
        )
        for row in rows
    ]
    lengths = [len(example.tokens) for example in examples]
    hidden = np.load(folder / "hidden.npy", mmap_mode="r")
    visual = np.load(folder / "visual.npy", mmap_mode="r")
    return Examples(examples, np.cumsum([0, *lengths]), hidden, visual)


def _compute(loaded: LoadedTarget, answers: Path, folder: Path) -> None:
    """Write the examples' tokens, states and pictures' embeddings."""
    groups = [group for group in read_examples(loaded, answers) if len(group) == 2]
    model = batched_target(loaded)
    cache = compute_features(model, groups)
    visual: list[npt.NDArray[np.float16]] = []
    for start in range(0, len(groups), 16):
        pixels = mx.concatenate(
            [group[0].prompt.inputs["pixel_values"] for group in groups[start : start + 16]]
        )
        seen = model.visual_tokens(pixels.transpose(0, 2, 3, 1)).astype(mx.float16)
        visual.append(np.array(seen))
    folder.mkdir(parents=True, exist_ok=True)
    examples = [example for group in groups for example in group]
    np.save(folder / "hidden.npy", np.concatenate([cache[id(example)] for example in examples]))
    np.save(folder / "visual.npy", np.concatenate(visual))
    rows = [
        {"prompt": e.prompt.tokens, "spans": e.prompt.image_spans, "answer": e.answer}
        for e in examples
    ]
    (folder / "examples.json").write_text(json.dumps(rows))


def with_taps(
    loaded: LoadedTarget, known: Examples, answers: Path, folder: Path, layers: Sequence[int]
) -> Examples:
    """The same examples, of which the target hands out what some of its layers read, too.

    Args:
        loaded: The target.
        known: Without taps.
        answers: The file that they come from.
        folder: Where the states are kept; the first time, the target computes them.
        layers: Whose inputs, in the order wanted.
    """
    file = folder / f"taps_{'_'.join(map(str, layers))}.npy"
    if not file.exists():
        target = TappedTarget(loaded.target, layers)
        shape = (int(known.starts[-1]), loaded.target.hidden_size * (len(layers) + 1))
        part = file.with_suffix(".part")
        wide = np.lib.format.open_memmap(part, mode="w+", dtype=np.float16, shape=shape)
        groups = [group for group in read_examples(loaded, answers) if len(group) == 2]
        starts = iter(known.starts)
        for states in (each for group in groups for each in read_by_target(target, group)):
            start = next(starts)
            wide[start : start + len(states)] = np.array(states.astype(mx.float16))
        wide.flush()
        part.rename(file)
    return replace(known, hidden=np.load(file, mmap_mode="r"))


def write_data_set_answers(loaded: LoadedTarget, answers: Path, file: Path) -> None:
    """Write what the data set itself answers to each prompt, in place of the target's answer."""
    tokenizer, lines = loaded.processor.tokenizer, []
    for number, line in enumerate(answers.read_text().splitlines()):
        row = json.loads(line)
        said = _data_set_answer(row["scene"], row["prompt"], random.Random(number))
        ids = tokenizer.encode(said, add_special_tokens=False)
        lines.append(json.dumps(row | {"answer": [*ids, loaded.eos_ids[0]]}))
    file.write_text("\n".join(lines) + "\n")


def _data_set_answer(number: int, prompt: str, rng: random.Random) -> str:
    """Answer as the target's own training data do."""
    drawn = random.Random(number)
    scene = draw_scene(drawn)
    if prompt in CAPTION_PROMPTS:
        return caption(scene, rng)
    if prompt in BRIEF_PROMPTS:
        return brief(scene, rng)
    return listing(scene) if prompt in LIST_PROMPTS else question(scene, drawn)[1]


def asked_of(answers: Path) -> list[tuple[int, str]]:
    """Scene or clip and prompt of each pair of examples, in the examples' order."""
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    keys = sorted((row["clip" if "clip" in row else "scene"], row["prompt"]) for row in rows)
    groups = [(key, len(list(group))) for key, group in itertools.groupby(keys)]
    return [key for key, size in groups if size == 2]


def are_clips(answers: Path) -> bool:
    """Whether these answers are about clips; they are all about scenes or all about clips."""
    with answers.open() as file:
        return "clip" in json.loads(next(file))


Ask = Callable[[int, int], str]  # from a prompt's number and that of its scene to what is asked


def _ask_caption(number: int, scene: int) -> str:  # noqa: ARG001
    return CAPTION_PROMPTS[number % len(CAPTION_PROMPTS)]


def _ask_clip(number: int, clip: int) -> str:  # noqa: ARG001
    return VIDEO_PROMPTS[number % len(VIDEO_PROMPTS)]


def _ask_question(number: int, scene: int) -> str:
    """Every third question asks for a list, whose answer is long."""
    if number % 3 == 2:
        return LIST_PROMPTS[number % len(LIST_PROMPTS)]
    return scene_question(scene)


def _ask_of_clip(number: int, clip: int) -> str:
    """Likewise."""
    return STEPS_PROMPTS[number % len(STEPS_PROMPTS)] if number % 3 == 2 else clip_question(clip)


FAMILIES: dict[str, Ask] = {"caption": _ask_caption, "question": _ask_question}
CLIP_FAMILIES: dict[str, Ask] = {"caption": _ask_clip, "question": _ask_of_clip}


def held_out_prompts(
    loaded: LoadedTarget, family: str, count: int, *, tuning: bool = False, clips: bool = False
) -> list[Prompt]:
    """Prompts about scenes that nothing was trained on.

    Args:
        loaded: The target.
        family: One of `FAMILIES`.
        count: How many.
        tuning: Of the scenes on which learning rates are chosen, instead of those reported.
        clips: About clips instead of scenes.
    """
    ask, shown = (CLIP_FAMILIES, CLIPS) if clips else (FAMILIES, SCENES)
    first = (TUNING if tuning else HELD_OUT) + 5000 + 1000 * list(ask).index(family)
    return [
        make_prompt(loaded, ask[family](i, first + i), shown.pictures(first + i))
        for i in range(count)
    ]
