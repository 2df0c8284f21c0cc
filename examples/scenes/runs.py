"""What the training stages share: the optimiser, its schedule and resumable checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten


def make_optimizer(rate: float) -> optim.MultiOptimizer:
    """Muon for the layers' matrices; AdamW, at a tenth of its rate, for everything else."""

    def is_matrix(path: str, weight: mx.array) -> bool:
        return "layers." in path and weight.ndim == 2

    muon = optim.Muon(rate, momentum=0.95, weight_decay=0.0)
    rest = optim.AdamW(0.1 * rate, betas=[0.9, 0.98], weight_decay=0.02)
    return optim.MultiOptimizer([muon, rest], [is_matrix])


def set_rate(
    optimizer: optim.MultiOptimizer, rate: float, step: int, steps: int, floor: float
) -> None:
    """Linear warm-up over 50 steps; constant until 3/8 of the steps, then linear to `floor`."""
    scale = min(1.0, (step + 1) / 50) * max(floor, min(1.0, 1.6 * (1 - step / steps)))
    for part, factor in zip(optimizer.optimizers, (1.0, 0.1), strict=True):
        part.learning_rate = mx.array(rate * factor * scale)


def save_run(
    folder: Path, model: nn.Module, optimizer: optim.Optimizer, step: int, seconds: float
) -> None:
    """Write a checkpoint; a kill at any moment leaves the old one or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"model.{k}": v for k, v in tree_flatten(model.parameters())}
    arrays |= {f"optimizer.{k}": v for k, v in tree_flatten(optimizer.state)}
    partial = folder / "partial.safetensors"
    mx.save_safetensors(
        str(partial), arrays, {"run": json.dumps({"step": step, "seconds": seconds})}
    )
    partial.replace(folder / "checkpoint.safetensors")


def load_run(folder: Path, model: nn.Module, optimizer: optim.Optimizer) -> tuple[int, float]:
    """Restore a checkpoint if there is one. Returns (step, seconds spent)."""
    file = folder / "checkpoint.safetensors"
    if not file.exists():
        return 0, 0.0
    arrays, metadata = mx.load(str(file), return_metadata=True)
    weights = [(k.removeprefix("model."), v) for k, v in arrays.items() if k.startswith("model.")]
    model.load_weights(weights)
    state = [
        (k.removeprefix("optimizer."), v) for k, v in arrays.items() if k.startswith("optimizer.")
    ]
    optimizer.state = tree_unflatten(state)
    run = json.loads(metadata["run"])
    return int(run["step"]), float(run["seconds"])


def load_stage(folder: Path) -> dict[str, mx.array]:
    """The weights of an earlier stage by their names in `train_language.Learner`.

    An exported target will do as well; it has no table of symbolic tokens.
    """
    file = folder / "checkpoint.safetensors"
    if file.exists():
        arrays = mx.load(str(file))
        return {k.removeprefix("model."): v for k, v in arrays.items() if k.startswith("model.")}
    arrays = mx.load(str(folder / "model.safetensors"))
    patch = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    arrays[patch] = arrays[patch].transpose(0, 2, 3, 1)  # from PyTorch's order
    return {f"target.{k}": v.astype(mx.float32) for k, v in arrays.items()}
