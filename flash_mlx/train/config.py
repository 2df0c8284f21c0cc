"""How to train: the settings, and the optimiser they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import mlx.core as mx
import mlx.optimizers as optim

from flash_mlx.train.losses import LossWeights

MUON_SCALE = 10  # Muon's learning rate over AdamW's: its steps have another unit


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Two runs with equal settings and examples give equal weights.

    Attributes:
        iterations: Steps in all.
        batch_size: Examples a step.
        optimizer: `muon` moves the layers' matrices by Muon, at ten times the learning rate, and
            all else by AdamW; `adamw` moves everything by AdamW. Muon learns more in as many steps
            (measured).
        learning_rate: Highest one, reached after `warmup` steps.
        final_learning_rate: Share of it that is left at the end of the cosine.
        warmup: Steps of linear increase.
        betas: Of AdamW.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are scaled down to this norm.
        ema_decay: Of the averaged weights, which are what is saved; less in the first steps.
        hidden_noise: Half-width of uniform noise on the target's hidden states, for texts of 512
            rows; longer texts get less in proportion (published: 0.1).
        losses: Shares of the objectives.
        compile: Whether the step is compiled. On a CPU that costs seconds at each new shape and
            gains nothing (measured).
        chunk: Base rows whose logits are in memory at a time.
        seed: Of order and noise.
        report_every: Steps between two reports.
        save_every: Steps between two checkpoints; the last step has one in any case.
        validate_every: Steps between two validations; 0: only after the last step.
    """

    iterations: int = 1000
    batch_size: int = 16
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 2e-3
    final_learning_rate: float = 0.05
    warmup: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.99
    hidden_noise: float = 0.0
    losses: LossWeights = field(default_factory=LossWeights)
    compile: bool = False
    chunk: int = 4096
    seed: int = 0
    report_every: int = 10
    save_every: int = 100
    validate_every: int = 0


def make_optimizer(config: TrainConfig) -> optim.Optimizer:
    """Return the optimiser, which follows its schedule by itself.

    Source of Muon: Jordan et al. 2024, momentum made orthogonal by Newton-Schulz iterations.
    """

    def is_matrix(name: str, weight: mx.array) -> bool:
        # Queries, slot embeddings and tables of tokens are rows side by side, not maps.
        return weight.ndim == 2 and name.endswith(".weight")

    adamw = optim.AdamW(schedule(config), list(config.betas), weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        return adamw
    muon = optim.Muon(schedule(config, MUON_SCALE), weight_decay=0)
    return optim.MultiOptimizer([muon, adamw], [is_matrix])


def schedule(config: TrainConfig, scale: float = 1) -> Callable[[mx.array], mx.array]:
    """Return the learning rate by step: linear up, cosine down."""
    peak = config.learning_rate * scale
    end = peak * config.final_learning_rate
    up = optim.linear_schedule(peak / (config.warmup + 1), peak, max(config.warmup, 1))
    down = optim.cosine_decay(peak, max(config.iterations - config.warmup, 1), end)
    joined: Callable[[mx.array], mx.array] = optim.join_schedules([up, down], [config.warmup])
    return joined
