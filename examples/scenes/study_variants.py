"""The study's variants, as data: what differs from the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The bundled drafter's recipe, but for what makes a run short: fewer slots, steps, examples a step.
DRAFTER: Mapping[str, Any] = {
    "block_size": 6,
    "num_latents": 16,
    "num_heads": 3,
    "head_dim": 64,
    "norm_inputs": True,
    "recurrent_size": 128,
}
TRAIN: Mapping[str, Any] = {"iterations": 120, "batch_size": 8, "warmup": 12, "ema_decay": 0.95}


@dataclass(frozen=True)
class Variant:
    """A recipe.

    Attributes:
        drafter: Settings of `FlashConfig` that differ from DRAFTER.
        train: Settings of `TrainConfig` that differ from TRAIN, as `configure` takes them.
        start: Where the weights start.
        answers: Which examples are learnt from: `both`, `greedy` or `sampled` answers of the
            target, or the `data set`'s own.
    """

    drafter: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    start: str = "random"
    answers: str = "both"


BASE = Variant()
PLAIN_SLOTS = {"recurrent_size": 0}


def _train(**changes: Any) -> Variant:
    return Variant(train={name.replace("__", "."): value for name, value in changes.items()})


GROUPS: dict[str, dict[str, Variant]] = {
    "latents": {
        "1": Variant({"num_latents": 1}),
        "4": Variant({"num_latents": 4}),
        "8": Variant({"num_latents": 8}),
        "16 (base)": BASE,
        "64": Variant({"num_latents": 64}),
    },
    "slot dependency": {
        "none": Variant(PLAIN_SLOTS),
        "Markov, rank 32": Variant(PLAIN_SLOTS | {"markov_rank": 32}),
        "Markov, rank 128": Variant(PLAIN_SLOTS | {"markov_rank": 128}),
        "Hydra, width 128": Variant(PLAIN_SLOTS | {"hydra_size": 128}),
        "recurrence, width 64": Variant({"recurrent_size": 64}),
        "recurrence, width 128 (base)": BASE,
        "recurrence, width 256": Variant({"recurrent_size": 256}),
    },
    "loss": {
        "cross-entropy + 0.1 SmoothL1 (base)": BASE,
        "cross-entropy alone": _train(losses__hidden=0),
        "paper: SmoothL1 + 0.1 cross-entropy": _train(
            losses__hidden=1, losses__distribution=0.1, losses__slot_decay=1
        ),
        "log acceptance": _train(losses__distribution=0, losses__acceptance=1),
        "cross-entropy + log acceptance": _train(losses__acceptance=1),
        "LK hybrid": _train(losses__distribution=0, losses__hybrid=1),
        "argmax": _train(losses__distribution=0, losses__argmax=1),
        "base + 0.1 ListMLE": _train(losses__ranking=0.1),
        "base, all slots alike": _train(losses__slot_decay=1),
        "base, until the first miss": _train(losses__until_fail=True),
    },
    "roll-out": {
        "1 block (base)": BASE,
        "2 blocks": _train(rollout=1),
        "3 blocks": _train(rollout=2),
    },
    "noise": {"none (base)": BASE, "0.1, as published": _train(hidden_noise=0.1)},
    "optimizer": {
        "Muon (base)": BASE,
        "AdamW, 2e-3": _train(optimizer="adamw"),
        "AdamW, 5e-3": _train(optimizer="adamw", learning_rate=5e-3),
    },
    "answers": {
        "the target's, greedy and sampled (base)": BASE,
        "the target's, greedy": Variant(answers="greedy"),
        "the target's, sampled": Variant(answers="sampled"),
        "the data set's": Variant(answers="data set"),
    },
    "start": {
        "random (base)": BASE,
        "last layer": Variant(start="last-layer"),
        "embeddings": Variant(start="embeddings"),
    },
    "block size": {
        f"{n}" if n != 6 else "6 (base)": Variant({"block_size": n}) if n != 6 else BASE
        for n in (2, 3, 4, 5, 6, 7, 8, 10)
    },
    "fusion": {
        "norms before it (base)": BASE,
        "no norms": Variant({"norm_inputs": False}),
    },
}
