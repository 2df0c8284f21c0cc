"""Stages 2 and 4: the language model learns to say what the visual tokens show.

    python train_language.py --output runs/symbols --visual symbols --layers 4 --steps 190 --floor 1
    python train_language.py --output runs/deep --visual symbols --init runs/symbols --steps 50
    mlx.launch -n 2 train_language.py --output runs/joint --visual pixels --init runs/aligned

With `--visual symbols` the visual tokens are sums of learned vectors, one for each label of a
patch: the language model learns what to do with them while the vision tower is still being trained.
`align.py` then fits the projector to these vectors, and with `--visual pixels` everything but the
vision tower is trained on real pictures. A deeper model starts from a shallower one, repeated.
Under `mlx.launch` each process takes its own scenes and gradients are averaged.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flash_mlx  # noqa: F401  (binds a fast BLAS before MLX is imported)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from tokenizers import Tokenizer

from data import (
    Batch,
    Conversations,
    clip_conversations,
    make_batch,
    make_clip_batch,
    scene_conversations,
)
from fastops import cross_entropy
from labels import NONE, NUM_CLASSES
from model import Llava, TextShape, VisionShape
from render import PATCHES
from runs import load_run, load_stage, make_optimizer, save_run, set_rate

CORRUPTED = 0.02  # share of visual tokens whose labels come from another patch of the same picture
NOISE = 0.1  # standard deviation, relative to the vectors'
KINDS = ("caption", "caption", "question+question+question+question", "list+question+brief")
CLIP_KINDS = (
    "caption",
    "steps+view+question",
    "view+steps+question",
    "events+question+view",
)


@dataclass(frozen=True)
class Course:
    """What a step learns from: scenes or clips.

    Attributes:
        chat: Their conversations.
        make: From these, the first number, how many and patches kept to a batch.
        split: The first number in training.
        held_out: The first number that is held out.
        watched: How many of these are asked about while training goes on; a multiple of 8.
    """

    chat: Conversations[Any]
    make: Callable[[Conversations[Any], int, int, int], Batch]
    split: int
    held_out: int
    watched: int


def courses(tokenizer: Tokenizer, kinds: tuple[str, ...]) -> tuple[Course, Course]:
    """Of scenes and of clips."""
    scenes = Course(scene_conversations(tokenizer, kinds), make_batch, 20_000_000, 30_000_000, 32)
    clips = Course(
        clip_conversations(tokenizer, CLIP_KINDS), make_clip_batch, 60_000_000, 70_000_000, 16
    )
    return scenes, clips


def between_pictures(chat: Conversations[Any]) -> mx.array:
    """Ids [R] before the first picture, then that of the line break between pictures."""
    return mx.array([*chat.prefix, *chat.encode("\n")])


class Learner(nn.Module):
    """The target and the table of symbolic visual tokens."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        text = TextShape(num_hidden_layers=layers)
        self.target = Llava(VisionShape(), text)
        self.table = mx.random.normal((NUM_CLASSES, text.hidden_size)) * 0.05


def visual_rows(model: Learner, visual: str, batch: dict[str, mx.array]) -> mx.array:
    """[B, F, N, D] visual tokens that are kept."""
    if visual == "pixels":
        pixels = batch["pixels"]
        rows = model.target.visual_tokens(pixels.flatten(0, 1)).reshape(
            *pixels.shape[:2], PATCHES, -1
        )
        return mx.take_along_axis(rows, batch["kept"][..., None], axis=2)
    table = mx.concatenate([model.table, mx.zeros((NONE + 1 - NUM_CLASSES, model.table.shape[1]))])
    rows = table[batch["classes"]].sum(axis=-2)
    return rows + batch["noise"] * mx.stop_gradient(rows.std())


def as_inputs(batch: Batch, visual: str, width: int, noisy: bool) -> dict[str, mx.array]:
    """The arrays that a step needs, on the device."""
    out = {"kept": batch.kept, "tokens": batch.tokens, "weights": batch.weights}
    if visual == "pixels":
        out["pixels"] = batch.pixels
        return {k: mx.array(v) for k, v in out.items()}
    rng = np.random.default_rng(int(batch.tokens.sum()))
    kept = batch.kept.copy()
    if noisy:
        wrong = rng.random(kept.shape) < CORRUPTED
        kept[wrong] = rng.integers(0, PATCHES, int(wrong.sum()))
    out["classes"] = np.take_along_axis(batch.classes, kept[..., None], axis=2)
    scale = NOISE if noisy else 0.0
    out["noise"] = (scale * rng.standard_normal((*kept.shape, width))).astype(np.float32)
    return {k: mx.array(v) for k, v in out.items()}


def loss_of(model: Learner, visual: str, prefix: mx.array, batch: dict[str, mx.array]) -> mx.array:
    """Mean cross-entropy of the answers' tokens [nats].

    Args:
        model: What is trained.
        visual: "pixels" or "symbols".
        prefix: [R] ids before the first picture, the last one being what stands between pictures.
        batch: From `as_inputs`.
    """
    target, tokens, kept = model.target, batch["tokens"], batch["kept"]
    embed = target.language_model.model.embed_tokens
    size, frames, _ = kept.shape
    first, width = prefix.shape[0] - 1, model.table.shape[1]
    before = mx.broadcast_to(embed(prefix[:-1]), (size, first, width))
    between = mx.broadcast_to(embed(prefix[-1]), (size, frames, 1, width))
    seen = mx.concatenate([visual_rows(model, visual, batch), between], axis=2)
    shared = mx.concatenate([before, seen.flatten(1, 2)[:, :-1]], axis=1)
    starts = first + (PATCHES + 1) * mx.arange(frames)[:, None]
    rows = mx.concatenate([kept, mx.full((size, frames, 1), PATCHES)], axis=2) + starts
    steps = mx.broadcast_to(mx.arange(first), (size, first))
    positions = mx.concatenate([steps, rows.flatten(1, 2)[:, :-1]], axis=1)
    stop = first + (PATCHES + 1) * frames - 1
    _, hidden = target.hidden(shared, positions, tokens, stop)
    logits = target.logits(hidden[:, :, :-1]).reshape(-1, target.shape.vocab_size)
    return cross_entropy(
        logits, tokens[:, :, 1:].reshape(-1), batch["weights"][:, :, :-1].reshape(-1)
    )


def stacked(weights: dict[str, mx.array], layers: int) -> list[tuple[str, mx.array]]:
    """A shallower model's weights, its layers repeated in order until there are `layers`."""
    mark = "language_model.model.layers."
    found = {int(k.split(mark)[1].split(".")[0]) for k in weights if mark in k}
    out = {k: v for k, v in weights.items() if mark not in k}
    for layer in range(layers):
        source = f"{mark}{layer % len(found)}."
        for k, v in weights.items():
            if source in k:
                out[k.replace(source, f"{mark}{layer}.")] = v
    return list(out.items())


def held_out_loss(
    model: Learner,
    args: argparse.Namespace,
    course: Course,
    shift: int = 0,
    backwards: bool = False,
) -> float:
    """Mean loss on what is held out.

    Args:
        model: What is trained.
        args: The command's.
        course: Scenes or clips.
        shift: Above 0, each conversation is shown another's pictures.
        backwards: Whether clips are shown from their end to their beginning.
    """
    losses = []
    for start in range(course.held_out, course.held_out + course.watched, 8):
        batch = course.make(course.chat, start, 8, args.kept)
        names = ("pixels", "classes", "kept")
        shown = {name: np.roll(getattr(batch, name), shift, axis=0) for name in names}
        if backwards:
            shown = {name: value[:, ::-1].copy() for name, value in shown.items()}
        inputs = as_inputs(replace(batch, **shown), args.visual, model.table.shape[1], noisy=False)
        losses.append(loss_of(model, args.visual, between_pictures(course.chat), inputs).item())
    return round(float(np.mean(losses)), 4)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/tokenizer.json"))
    parser.add_argument(
        "--init", type=Path, help="folder of an earlier stage, or of an exported target"
    )
    parser.add_argument("--visual", choices=("symbols", "pixels"), required=True)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--kept", type=int, default=80, help="visual tokens read, of 256")
    parser.add_argument(
        "--kinds", nargs="+", default=list(KINDS), help="conversations about a picture"
    )
    parser.add_argument(
        "--clips",
        type=int,
        nargs=2,
        default=(0, 1),
        metavar=("N", "M"),
        help="steps that learn from clips: N of every M; the others learn from scenes",
    )
    parser.add_argument("--clip-batch", type=int, default=4, help="clips a step")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0.02, help="Muon's; AdamW has a tenth")
    parser.add_argument("--floor", type=float, default=0.02, help="last rate, relative to --rate")
    parser.add_argument(
        "--offset", type=int, default=0, help="first scene, so that stages see new ones"
    )
    parser.add_argument("--report", type=float, default=240, help="seconds between checkpoints")
    return parser.parse_args()


def main() -> None:
    args = parse()
    world = mx.distributed.init()
    mx.random.seed(1)
    scenes, clips = courses(Tokenizer.from_file(str(args.tokenizer)), tuple(args.kinds))
    model = Learner(args.layers)
    if args.init:
        weights = load_stage(args.init)
        model.load_weights(stacked(weights, args.layers), strict="table" in weights)
    model.target.vision_tower.freeze()
    if args.visual == "symbols":
        model.target.multi_modal_projector.freeze()
    if args.init:
        model.freeze(recurse=False, keys=["table"])
    optimizer = make_optimizer(args.rate)
    step, spent = load_run(args.output, model, optimizer)
    prefix = between_pictures(scenes.chat)
    mx.eval(model.parameters())
    print(
        sum(v.size for _, v in tree_flatten(model.trainable_parameters())), "trainable", flush=True
    )

    def update(batch: dict[str, mx.array]) -> mx.array:
        loss, gradients = nn.value_and_grad(
            model, lambda m: loss_of(m, args.visual, prefix, batch)
        )(model)
        gradients, _ = optim.clip_grad_norm(nn.average_gradients(gradients), 1.0)
        optimizer.update(model, gradients)
        return loss

    width = model.table.shape[1]
    begin, average, shown, tokens = time.monotonic() - spent, 0.0, 0.0, 0
    while step < args.steps:
        set_rate(optimizer, args.rate, step, args.steps, args.floor)
        course = clips if step % args.clips[1] < args.clips[0] else scenes
        size = args.clip_batch if course is clips else args.batch
        first = course.split + args.offset + (step * world.size() + world.rank()) * size
        batch = course.make(course.chat, first, size, args.kept)
        loss = update(as_inputs(batch, args.visual, width, noisy=True))
        mx.eval(model.parameters(), optimizer.state, loss)
        step, tokens = step + 1, tokens + int(batch.weights.sum())
        average = loss.item() if step == 1 else 0.97 * average + 0.03 * loss.item()
        elapsed = time.monotonic() - begin
        due = elapsed - shown > args.report or step == args.steps
        if due and world.rank() == 0:
            shown = elapsed
            save_run(args.output, model, optimizer, step, elapsed)
            row: dict[str, Any] = {
                "step": step,
                "seconds": round(elapsed),
                "loss": round(average, 4),
            }
            row |= {
                "held_out": held_out_loss(model, args, scenes),
                "other_picture": held_out_loss(model, args, scenes, 1),
            }
            if args.clips[0]:
                row |= {
                    "clips": held_out_loss(model, args, clips),
                    "other_clip": held_out_loss(model, args, clips, 1),
                    "clips_backwards": held_out_loss(model, args, clips, backwards=True),
                }
            print(json.dumps(row | {"answer_tokens": tokens}), flush=True)
    if world.rank() == 0:
        save_run(args.output, model, optimizer, step, time.monotonic() - begin)


if __name__ == "__main__":
    main()
