"""The study's variants, as data: what differs from the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
TRAIN: Mapping[str, Any] = {
    "iterations": 120,
    "batch_size": 12,
    "base_share": 0.33,
    "warmup": 12,
    "ema_decay": 0.95,
}


@dataclass(frozen=True)
class Variant:
    """A recipe.

    Attributes:
        drafter: Settings of `FlashConfig` that differ from DRAFTER.
        train: Settings of `TrainConfig` that differ from TRAIN, as `configure` takes them.
        start: Where the weights start.
        answers: Which examples are learnt from: `both`, `greedy` or `sampled` answers of the
            target, both about `captions` or `questions` alone, or the `data set`'s own.
    """

    drafter: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    start: str = "random"
    answers: str = "both"


BASE = Variant()
PLAIN_SLOTS = {"recurrent_size": 0}


def _train(**changes: Any) -> Variant:
    return Variant(train={name.replace("__", "."): value for name, value in changes.items()})


# With the recipe that learns most in few steps; these stand beside other drafters, too.
LONG = _train(iterations=400, learning_rate=4e-3)
LONG_BLIND = replace(LONG, drafter={"num_latents": 0})
LONG_EMBEDDINGS = replace(LONG, start="embeddings")
LONG_ROLLOUT = _train(iterations=400, learning_rate=4e-3, rollout=1)

# In the order in which they are run: what decides most comes first. The first of a group is what
# the others are compared with.
GROUPS: dict[str, dict[str, Variant]] = {
    "latents": {
        "16 (base)": BASE,
        "none: the drafter reads no image": Variant({"num_latents": 0}),
        "1": Variant({"num_latents": 1}),
        "4": Variant({"num_latents": 4}),
        "8": Variant({"num_latents": 8}),
        "64": Variant({"num_latents": 64}),
        "all visual tokens": Variant({"compression": "none"}),
    },
    "slot dependency": {
        "recurrence, width 128 (base)": BASE,
        "none": Variant(PLAIN_SLOTS),
        "Markov, rank 128": Variant(PLAIN_SLOTS | {"markov_rank": 128}),
        "Hydra, width 128": Variant(PLAIN_SLOTS | {"hydra_size": 128}),
    },
    "loss": {
        "cross-entropy + 0.1 SmoothL1 (base)": BASE,
        "cross-entropy alone": _train(losses__hidden=0),
        "published: SmoothL1 + 0.1 cross-entropy": _train(
            losses__hidden=1, losses__distribution=0.1, losses__slot_decay=1
        ),
        "log acceptance": _train(losses__distribution=0, losses__acceptance=1),
        "LK hybrid": _train(losses__distribution=0, losses__hybrid=1),
        "argmax": _train(losses__distribution=0, losses__argmax=1),
        "base, all slots alike": _train(losses__slot_decay=1),
    },
    "compression": {
        "learned queries (base)": BASE,
        "mean of stretches": Variant({"compression": "mean"}),
        "every 16th row": Variant({"compression": "stride"}),
        "merged by similarity": Variant({"compression": "merge"}),
    },
    "block size": {
        "6 (base)": BASE,
        **{f"{n}": Variant({"block_size": n}) for n in (2, 3, 4, 5, 7, 8, 10)},
    },
    "optimizer": {
        "Muon (base)": BASE,
        "Muon, twice the rate": _train(learning_rate=4e-3),
        "Muon, four times the rate": _train(learning_rate=8e-3),
        "AdamW, 2e-3": _train(optimizer="adamw"),
        "AdamW, 5e-3": _train(optimizer="adamw", learning_rate=5e-3),
    },
    "roll-out": {
        "1 block (base)": BASE,
        "2 blocks": _train(rollout=1),
    },
    "fusion": {
        "gated, inputs normed (base)": BASE,
        "gated, inputs as they are": Variant({"norm_inputs": False}),
        "linear, inputs normed": Variant({"fusion": "linear"}),
    },
    "answers": {
        "the target's, greedy and sampled (base)": BASE,
        "the target's, greedy": Variant(answers="greedy"),
        "the target's, sampled": Variant(answers="sampled"),
        "the data set's own": Variant(answers="data set"),
    },
    "one family of prompts": {
        "captions and questions (base)": BASE,
        "captions alone": Variant(answers="captions"),
        "questions and lists alone": Variant(answers="questions"),
    },
    "draft vocabulary": {  # 512: all that answers say; 384: 99.7%; 256: 94%
        "1280 tokens (base)": BASE,
        **{f"{n} tokens": Variant({"draft_vocab_size": n}) for n in (512, 384, 256)},
    },
    "taps": {
        "last hidden states (base)": BASE,
        "inputs of layers 2, 6 and 9 as well": Variant({"taps": True}),
    },
    "start": {
        "random (base)": BASE,
        "last layer": Variant(start="last-layer"),
        "embeddings": Variant(start="embeddings"),
    },
    "noise": {"none (base)": BASE, "0.1, as published": _train(hidden_noise=0.1)},
    "400 steps": {
        "twice the rate (base here)": LONG,
        "as the base elsewhere": _train(iterations=400),
        "the drafter reads no image": LONG_BLIND,
        "roll-out of 2 blocks": LONG_ROLLOUT,
        "start: embeddings": LONG_EMBEDDINGS,
    },
}
