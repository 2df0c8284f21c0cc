"""How to train: the settings, and the optimiser they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.optimizers as optim

from flash_mlx.train.losses import LossWeights

MUON_SCALE = 10  # Muon's learning rate over AdamW's: its steps have another unit


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Two runs with equal settings and examples give equal weights.

    Attributes:
        iterations: Steps in all.
        batch_size: Examples of a batch.
        accumulate: Batches of a step; their gradients are averaged.
        base_share: Share of an answer's rows at which the drafter stands in a step, drawn anew for
            each; above 0, at most 1.
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
        rollout: Further passes in which the drafter reads its own predictions in place of the
            target's hidden states of the answer: see `teacher.rolled_out`.
        order: `mixed` draws all examples alike; `text_first` begins with those without pictures,
            and from half-way on draws a growing share of those with.
        losses: Shares of the objectives.
        dtype: What a step computes in. Weights, averages and moments are float32 in any case.
        compile: Whether the step is compiled. On a CPU that costs seconds at each new shape and
            gains nothing (measured).
        chunk: Base rows whose logits are in memory at a time.
        seed: Of order and noise.
        report_every: Steps between two reports.
        save_every: Steps between two checkpoints; the last step has one in any case.
        validate_every: Steps between two validations; 0: only after the last step.
        best_by: What `validate` measures by which the best weights are kept, more being better;
            empty: the last are kept.
        patience: Validations in a row without a better one that end the run; 0: none do.
    """

    iterations: int = 1000
    batch_size: int = 16
    accumulate: int = 1
    base_share: float = 1.0
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 2e-3
    final_learning_rate: float = 0.05
    warmup: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.99
    hidden_noise: float = 0.0
    rollout: int = 0
    order: Literal["mixed", "text_first"] = "mixed"
    losses: LossWeights = field(default_factory=LossWeights)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    chunk: int = 4096
    seed: int = 0
    report_every: int = 10
    save_every: int = 100
    validate_every: int = 0
    best_by: str = ""
    patience: int = 0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: If a value is out of its range.
        """
        whole = {"warmup": 0, "rollout": 0, "validate_every": 0, "patience": 0, "seed": 0}
        whole |= dict.fromkeys(
            ("iterations", "batch_size", "accumulate", "chunk", "report_every", "save_every"), 1
        )
        for name, least in whole.items():
            value = vars(self)[name]
            if type(value) is not int or not least <= value < 2**31:
                raise ValueError(f"{name} must be a whole number, at least {least}; got {value!r}.")
        above_zero = ("learning_rate", "max_grad_norm", "base_share")
        shares = {"final_learning_rate": 0, "weight_decay": 0, "ema_decay": 0, "hidden_noise": 0}
        for name, low in (dict.fromkeys(above_zero, 1e-30) | shares).items():
            value = vars(self)[name]
            if type(value) not in (int, float) or not low <= value < float("inf"):
                rule = "0 or more" if not low else "above 0"
                raise ValueError(f"{name} must be a number, {rule}; got {value!r}.")
        betas = self.betas
        if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(map(_is_share, betas))):
            raise ValueError(f"betas must be two numbers from 0 to below 1; got {betas!r}.")
        if type(self.compile) is not bool:
            raise ValueError(f"compile must be true or false; got {self.compile!r}.")
        if not isinstance(self.best_by, str):
            raise ValueError(f"best_by must be a name; got {self.best_by!r}.")
        if self.base_share > 1:
            raise ValueError(f"base_share must be a share, at most 1; got {self.base_share!r}.")
        for name, known in _CHOICES.items():
            if vars(self)[name] not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}; got {vars(self)[name]!r}."
                )


def _is_share(value: object) -> bool:
    return type(value) in (int, float) and 0 <= cast(float, value) < 1


_CHOICES = {
    "optimizer": ("muon", "adamw"),
    "order": ("mixed", "text_first"),
    "dtype": ("float32", "bfloat16", "float16"),
}
_EAGLE_LOSSES = LossWeights(hidden=1.0, distribution=0.1, slot_decay=1.0)

# What the methods publish, as far as this trainer has it: all decay by a cosine here, and clip the
# gradient's norm where they clip its values.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "ours": {"base_share": 0.33},  # as good a step for a third of its cost (docs/ablations.md)
    # Source: FLASH, arXiv 2505.12728, and its published code.
    "flash": {
        "optimizer": "adamw",
        "learning_rate": 1e-4,
        "weight_decay": 0.05,
        "max_grad_norm": 0.5,
        "hidden_noise": 0.1,
        "losses": _EAGLE_LOSSES,
    },
    # Source: EAGLE, arXiv 2401.15077.
    "eagle": {
        "optimizer": "adamw",
        "learning_rate": 3e-5,
        "weight_decay": 0.0,
        "max_grad_norm": 0.5,
        "hidden_noise": 0.1,
        "losses": _EAGLE_LOSSES,
    },
    # Source: MSD, arXiv 2505.14260: text alone, then a growing share of pictures.
    "msd": {
        "optimizer": "adamw",
        "learning_rate": 5e-5,
        "weight_decay": 0.0,
        "max_grad_norm": 0.5,
        "hidden_noise": 0.1,
        "order": "text_first",
        "losses": _EAGLE_LOSSES,
    },
    # Source: ViSpec, arXiv 2509.15235, second stage: the guard against reading the next token off
    # the target's own hidden state is the pass over the drafter's predictions.
    "vispec": {
        "optimizer": "adamw",
        "learning_rate": 3e-6,
        "max_grad_norm": 0.5,
        "hidden_noise": 0.1,
        "rollout": 1,
        "losses": LossWeights(
            hidden=0.0, distribution=0.0, variation=20.0, ranking=0.1, slot_decay=1.0
        ),
    },
}

# What a drafter that is there already is trained by, unless told otherwise. MSD's objective is
# EAGLE's; its two stages need questions without pictures, so they are for those who ask.
PRESET_OF: Mapping[str, str] = {
    "flash": "ours",
    "eagle": "eagle",
    "msd": "eagle",
    "vispec": "vispec",
}

# The learning rate of a drafter that is there already, by preset; AdamW's for a width of 4096, as
# published, of EAGLE and MSD. ViSpec's 3e-6 is for 20 epochs of 68,000 answers, too little here.
GOING_ON: Mapping[str, float] = {
    "ours": 2e-4,
    "flash": 1e-5,
    "eagle": 3e-5,
    "msd": 5e-5,
    "vispec": 1e-5,
}
PUBLISHED_WIDTH = 4096


def rate_for_going_on(method: str, hidden_size: int) -> float:
    """Return the learning rate of a drafter that is there already.

    AdamW moves every weight by as much, so that narrow layers bear more. On the demo (192), in 25
    steps, EAGLE at 3e-5 gained nothing, and at 9e-4 1.54 tokens a pass from 1.32; in 40 steps
    ViSpec at 3e-5 gained nothing, and at 3e-4 1.70 from 1.63.

    Args:
        method: One of `PRESETS`.
        hidden_size: D of the drafter.

    Source: Yang et al. 2022, Tensor Programs V, arXiv 2203.03466: rates by 1 / width.
    """
    rate = GOING_ON[method]
    return rate if method == "ours" else rate * PUBLISHED_WIDTH / hidden_size


def configure(method: str = "ours", changes: Mapping[str, Any] | None = None) -> TrainConfig:
    """Return the settings of a method.

    Args:
        method: One of `PRESETS`.
        changes: Settings that differ; `losses.NAME` is one of `LossWeights`.

    Raises:
        ValueError: If there is no such method or setting, or a value is out of its range.
    """
    if method not in PRESETS:
        raise ValueError(f"A preset must be one of {', '.join(PRESETS)}; got {method!r}.")
    values = {**PRESETS[method]}
    losses = values.pop("losses", LossWeights())
    values |= changes or {}
    shares = {name: values.pop(name) for name in list(values) if name.startswith("losses.")}
    known = {field.name for field in fields(TrainConfig)} - {"losses"}
    known |= {f"losses.{field.name}" for field in fields(LossWeights)}
    if unknown := sorted((values.keys() | shares.keys()) - known):
        raise ValueError(
            f"Settings must be among {', '.join(sorted(known))}; got {', '.join(unknown)}."
        )
    for name, value in shares.items():
        if name == "losses.until_fail" and type(value) is not bool:
            raise ValueError(f"{name} must be true or false; got {value!r}.")
        if type(value) not in (int, float, bool) or not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a number, 0 or more; got {value!r}.")
    losses = replace(losses, **{name.removeprefix("losses."): v for name, v in shares.items()})
    return TrainConfig(**values, losses=losses)


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
