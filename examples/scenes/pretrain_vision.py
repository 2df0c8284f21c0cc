"""Stage 1: the vision tower learns what each patch shows.

    python pretrain_vision.py --output runs/vision --steps 1400

Every picture is new: scene i of the stage is drawn with the seed (SPLIT, i), so a resumed run goes
on where it stopped. The head over the labels is thrown away afterwards.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import flash_mlx  # noqa: F401  (binds a fast BLAS before MLX is imported)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from fastops import cross_entropy
from labels import GROUPS, NUM_CLASSES, OFFSETS, patch_labels
from model import VisionShape, VisionTower
from render import render
from runs import load_run, make_optimizer, save_run, set_rate
from world import draw_scene

SPLIT = 11_000_000
HELD_OUT = 12_000_000


def make_batch(start: int, size: int) -> tuple[mx.array, mx.array]:
    """Pictures [B, 128, 128, 3] in [-1, 1] and labels [B, P, A] of scenes start, start + 1, ..."""
    pixels, labels = [], []
    for seed in range(start, start + size):
        scene = draw_scene(random.Random(seed))
        image, owner = render(scene, seed)
        pixels.append(image.astype(np.float32) / 127.5 - 1)
        labels.append(patch_labels(scene, owner))
    return mx.array(np.stack(pixels)), mx.array(np.stack(labels))


class DenseLabels(nn.Module):
    """The tower and a linear head over all label groups."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.tower = VisionTower(shape)
        self.head = nn.Linear(shape.hidden_size, NUM_CLASSES)

    def __call__(self, pixels: mx.array) -> mx.array:
        return self.head(self.tower(pixels)[:, 1:])


def loss_of(model: DenseLabels, pixels: mx.array, labels: mx.array) -> mx.array:
    """Sum over groups of the mean cross-entropy over the patches to which the group applies."""
    logits = model(pixels)
    total = mx.array(0.0)
    for column, (name, size) in enumerate(GROUPS.items()):
        start = OFFSETS[name]
        label = labels[..., column].reshape(-1)
        part = logits[..., start : start + size].reshape(-1, size)
        weight = (label >= 0).astype(mx.float32)
        total = total + cross_entropy(part, mx.maximum(label, 0), weight)
    return total


def accuracy(model: DenseLabels, count: int = 256) -> dict[str, float]:
    """Share of patches classified right, by group, on held-out pictures."""
    right = np.zeros(len(GROUPS))
    seen = np.zeros(len(GROUPS))
    for start in range(0, count, 32):
        pixels, labels = make_batch(HELD_OUT + start, 32)
        logits, truth = np.array(model(pixels)), np.array(labels)
        for column, (name, size) in enumerate(GROUPS.items()):
            first = OFFSETS[name]
            guess = logits[..., first : first + size].argmax(-1)
            applies = truth[..., column] >= 0
            right[column] += (guess == truth[..., column])[applies].sum()
            seen[column] += applies.sum()
    return {name: round(float(r / s), 4) for name, r, s in zip(GROUPS, right, seen, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.02, help="Muon's; AdamW has a tenth")
    args = parser.parse_args()
    mx.random.seed(0)
    model = DenseLabels(VisionShape())
    optimizer = make_optimizer(args.rate)
    step, spent = load_run(args.output, model, optimizer)
    mx.eval(model.parameters())

    def update(pixels: mx.array, labels: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(model, loss_of)(model, pixels, labels)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        return loss

    begin, average, shown = time.monotonic() - spent, 0.0, 0.0
    while step < args.steps:
        set_rate(optimizer, args.rate, step, args.steps, floor=0.01)
        loss = update(*make_batch(SPLIT + step * args.batch, args.batch))
        mx.eval(model.parameters(), optimizer.state, loss)
        step += 1
        average = loss.item() if step == 1 else 0.98 * average + 0.02 * loss.item()
        elapsed = time.monotonic() - begin
        if elapsed - shown > 60:
            shown = elapsed
            save_run(args.output, model, optimizer, step, elapsed)
            row = {
                "step": step,
                "seconds": round(elapsed),
                "loss": round(average, 4),
                **accuracy(model, 96),
            }
            print(json.dumps(row), flush=True)
    save_run(args.output, model, optimizer, step, time.monotonic() - begin)
    print(json.dumps({"step": step, "final": accuracy(model)}), flush=True)


if __name__ == "__main__":
    main()
