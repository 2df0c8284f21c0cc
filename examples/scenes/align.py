"""Stage 3: the projector learns to turn vision features into the symbolic tokens of stage 2.

    python align.py --vision runs/vision --language runs/deep --output runs/aligned

The target of a patch is the sum of its labels' vectors. Features are standardised while the MLP is
fitted (they are ill-conditioned) and the standardisation is folded into its first layer.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import flash_mlx  # noqa: F401  (binds a fast BLAS before MLX is imported)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from labels import NUM_CLASSES, classes, patch_labels
from model import Projector, TextShape, VisionShape, VisionTower
from render import render
from world import draw_scene

SPLIT = 13_000_000
OBJECT_WEIGHT = 3.0


def collect(
    tower: VisionTower, table: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [R, Dv], targets [R, D] and weights [R] of all patches of `count` pictures."""
    features, targets, weights = [], [], []
    padded = np.concatenate([table, np.zeros((1, table.shape[1]), np.float32)])
    for start in range(SPLIT, SPLIT + count, 20):
        pixels, owners = [], []
        for seed in range(start, start + 20):
            scene = draw_scene(random.Random(seed))
            image, owner = render(scene, seed)
            pixels.append(image.astype(np.float32) / 127.5 - 1)
            owners.append(owner)
            targets.append(padded[classes(patch_labels(scene, owner))].sum(1))
        features.append(
            np.array(tower(mx.array(np.stack(pixels)))[:, 1:]).reshape(-1, tower_width(tower))
        )
        weights.append(np.where(np.concatenate(owners) > 0, OBJECT_WEIGHT, 1.0))
    return (
        np.concatenate(features),
        np.concatenate(targets),
        np.concatenate(weights).astype(np.float32),
    )


def tower_width(tower: VisionTower) -> int:
    return int(tower.vision_model.post_layernorm.weight.shape[0])


def fit(x: np.ndarray, y: np.ndarray, w: np.ndarray, steps: int) -> tuple[Projector, float]:
    """Fit the MLP to (x, y); the last 5% of the rows measure R^2."""
    mean, std = x.mean(0), x.std(0) + 1e-4
    scale = float(y.std())
    held = len(x) // 20
    xs, ys, ws = mx.array((x - mean) / std), mx.array(y / scale), mx.array(w)
    projector = Projector(VisionShape(hidden_size=x.shape[1]), TextShape(hidden_size=y.shape[1]))
    rate = optim.join_schedules(
        [optim.linear_schedule(1e-5, 3e-3, 50), optim.cosine_decay(3e-3, steps, 1e-5)], [50]
    )
    optimizer = optim.AdamW(rate, weight_decay=1e-4)

    def loss(model: Projector, a: mx.array, b: mx.array, c: mx.array) -> mx.array:
        return (((model(a) - b) ** 2).mean(-1) * c).mean()

    step = nn.value_and_grad(projector, loss)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = mx.array(rng.integers(0, len(x) - held, 2048))
        _, gradients = step(projector, xs[rows], ys[rows], ws[rows])
        optimizer.update(projector, gradients)
        mx.eval(projector.parameters(), optimizer.state)
    left = ((projector(xs[-held:]) - ys[-held:]) ** 2).sum() / (ys[-held:] ** 2).sum()
    first, second = projector.linear_1, projector.linear_2
    first.bias = first.bias - first.weight @ mx.array(mean / std)
    first.weight = first.weight / mx.array(std)
    second.weight, second.bias = second.weight * scale, second.bias * scale
    return projector, 1 - left.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vision", type=Path, required=True)
    parser.add_argument("--language", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    mx.random.seed(2)
    seen = mx.load(str(args.vision / "checkpoint.safetensors"))
    said = mx.load(str(args.language / "checkpoint.safetensors"))
    tower = VisionTower(VisionShape())
    mark = "model.tower."
    tower.load_weights([(k.removeprefix(mark), v) for k, v in seen.items() if k.startswith(mark)])
    table = np.array(said["model.table"])
    if table.shape[0] != NUM_CLASSES:
        raise ValueError(f"The table must have {NUM_CLASSES} rows; it has {table.shape[0]}.")
    projector, explained = fit(*collect(tower, table, args.pictures), args.steps)
    print(json.dumps({"explained_variance": round(explained, 4)}), flush=True)
    parts = {"model.target.vision_tower": tower, "model.target.multi_modal_projector": projector}
    out = {
        k: v for k, v in said.items() if k.startswith("model.") and not k.startswith(tuple(parts))
    }
    for name, part in parts.items():
        out |= {f"{name}.{k}": v for k, v in tree_flatten(part.parameters())}
    args.output.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(args.output / "checkpoint.safetensors"), out, {"run": "{}"})


if __name__ == "__main__":
    main()
