"""How many texts to decode at a time: as many as bring most tokens per second here.

What a round costs each of several texts is measured once, with the loops and the joined passes of
`batch`, and stored beside the costs of one text alone. From these costs and from how good the
drafter is known to be follows the rate of each batch size, with as many drafts as pay in it: where
a machine has little to spare for more rows, large batches draft less, down to plain decoding.

What is sampled depends on how much is drafted, so sampled texts draft as much as they would alone:
each is the same in every batch.

Shapes:
    B: texts.    m: rows of a tree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx

from flash_mlx.around import TargetAround
from flash_mlx.batch import Batch
from flash_mlx.cost import Costs
from flash_mlx.decode import Cache, Target
from flash_mlx.draft.adaptive import AdaptiveDrafter, paced, unpaced
from flash_mlx.draft.calibrate import (
    GREEDY,
    SPARE_ROWS,
    Calibrator,
    Junk,
    Scratch,
    fastest,
)
from flash_mlx.draft.drafter import FlashDrafter
from flash_mlx.loading import Model
from flash_mlx.prompt import Prompt
from flash_mlx.store import TextStore
from flash_mlx.targets.scratch import scratch_cache
from flash_mlx.targets.selftest import check_joined
from flash_mlx.tree import Topology

SIZES = (2, 4, 8, 16)
ROWS = (1, 2, 4, 8, 12)
WORTHWHILE = 1.05  # times the rate of a smaller batch


@dataclass(frozen=True, eq=False)
class BatchCalibrator(Calibrator):
    """Knows what rounds and drafts cost each of B texts that are decoded together.

    Attributes:
        alone: Knows it for one text.
        texts: B.
    """

    alone: Calibrator = field(kw_only=True)
    texts: int = field(kw_only=True)

    def _measure(self, context: int) -> tuple[Costs, bool]:
        """Return the costs, and whether they are worth remembering."""
        caches = [self.scratch(context) for _ in range(self.texts)]
        limit = self.target.max_context
        room = math.inf if limit is None else limit - context - SPARE_ROWS
        counts = [rows for rows in ROWS if rows <= max(1, room)]
        times, steady = fastest({rows: partial(self._round, caches, rows) for rows in counts})
        rounds = tuple((rows, seconds / self.texts) for rows, seconds in times.items())
        drafts = self.alone.costs(context, greedy=True).drafts
        return Costs(min(times.values()) / self.texts, rounds, drafts), steady

    def _round(self, caches: Sequence[Scratch], rows: int) -> float:
        """Return the time of a round of all texts with trees of so many rows [s]."""
        batch, junk = Batch(self.target), Junk(Topology.chain(rows - 1))
        length = caches[0].length
        settings: dict[str, Any] = {"sampler": GREEDY, "key": mx.random.key(0)}
        loops: list[Any] = []
        for cache in caches:
            seat = batch.seat()
            prompt = Prompt((0,) * (length + 1))
            loops.append(
                seat.decode(
                    _Begun(seat, cache), junk, prompt, max_tokens=4 * rows, stop_ids=(), **settings
                )
            )
            next(loops[-1])
        start = time.perf_counter()
        batch.step()
        seconds = time.perf_counter() - start
        for loop, cache in zip(loops, caches, strict=True):
            loop.close()
            cache.rewind(length)  # or the context would be full after a few rounds
        return seconds


class _Begun(TargetAround):
    """A target whose text has rows in its cache already."""

    def __init__(self, target: Target, cache: Cache) -> None:
        super().__init__(target)
        self._cache = cache

    def make_cache(self) -> Cache:
        return self._cache


@dataclass(frozen=True, eq=False)
class Together:
    """How texts are decoded together.

    Attributes:
        size: B at most; 1 is one after the other.
        model: Its drafter drafts as much as pays in such a batch; for sampled texts, as alone.
        reason: Why so many, in a line.
    """

    size: int
    model: Model
    reason: str

    def batch(self) -> Batch | None:
        """Return an empty batch; None for one text after the other."""
        return Batch(self.model.target) if self.size > 1 else None


def together(model: Model, size: int, *, greedy: bool) -> Together:
    """Return how to decode `size` texts at a time.

    Args:
        model: From `load`.
        size: B.
        greedy: Whether the texts are.

    Raises:
        ValueError: If `size` is below 1, or the model reads one text at a time.
    """
    if size < 1:
        raise ValueError(f"The batch size must be 1 or more; got {size}.")
    if size == 1:
        return Together(1, model, "Batches: none was asked for")
    if not check_joined(model.loaded.target):
        raise ValueError(
            f"A {model.loaded.model_type} model reads one text at a time, so the batch size must "
            f"be 1; got {size}. Leave it out."
        )
    own = _paced(model, size) if greedy else model
    return Together(size, own, f"Batches: {size} texts at a time, as asked for")


def best_together(model: Model, num_rows: int, most: int, *, greedy: bool) -> Together:
    """Return how to decode many texts, by measured costs.

    Args:
        model: From `load`.
        num_rows: About how long the prompts are.
        most: Largest batch size.
        greedy: Whether the texts are.
    """
    target = model.loaded.target
    if most < SIZES[0]:
        return Together(1, model, "Batches: none for so few texts")
    if not check_joined(target):
        return Together(1, model, f"Batches: none, a {model.loaded.model_type} model has none")
    room = TextStore().max_bytes // max(1, scratch_cache(target, max(2, num_rows)).nbytes)
    alone, belief = _calibrator(model), _belief(model)
    depth = None if greedy else _best(alone.costs(num_rows, greedy=False), belief)[1]
    rates = {1: _best(alone.costs(num_rows, greedy=True), belief, depth)[0]}
    for size in SIZES:
        if size > min(most, room):
            break
        costs = _batch_calibrator(model, size).costs(num_rows, greedy=True)
        rates[size] = _best(costs, belief, depth)[0]
        if rates[size] < WORTHWHILE * max(rates[other] for other in rates if other != size):
            break
    best = next(s for s, rate in rates.items() if WORTHWHILE * rate >= max(rates.values()))
    known = ", ".join(f"{size}: {rate / rates[1]:.2f}" for size, rate in rates.items())
    reason = f"Batches: {best} at a time; expected tokens per second by batch size here: {known}"
    return Together(best, _paced(model, best) if best > 1 and greedy else model, reason)


def _best(costs: Costs, belief: float, depth: int | None = None) -> tuple[float, int]:
    """Return the tokens per second of one of a batch's texts, times B, and with how many drafts.

    Args:
        costs: Of that batch.
        belief: See `_belief`.
        depth: How many; None: as many as bring most.
    """
    deepest = costs.drafts[-1][0] if costs.drafts and belief else 0
    rates, tokens = [], 0.0
    for count in range(deepest + 1):
        tokens += belief**count
        plain_tokens = (costs.round(1 + count) if count else 1.0) + costs.draft(count)
        rates.append(tokens / (plain_tokens * costs.plain))
    best = rates.index(max(rates)) if depth is None else min(depth, deepest)
    return rates[best], best


def _belief(model: Model) -> float:
    """Return how often drafts are accepted, as far as the drafter's training measured it."""
    drafter = unpaced(model.drafter)
    return drafter.model.config.expected_acceptance if isinstance(drafter, FlashDrafter) else 0.0


def _calibrator(model: Model) -> Calibrator:
    target, drafter = model.loaded.target, unpaced(model.drafter)
    scratch: Callable[[int], Scratch] = partial(scratch_cache, target)
    return Calibrator(target, scratch, target.model, drafter, more=target.costs_key)


def _batch_calibrator(model: Model, size: int) -> BatchCalibrator:
    alone = _calibrator(model)
    parts = (alone.target, alone.scratch, alone.weights, alone.drafter)
    return BatchCalibrator(*parts, more={"texts": str(size)}, alone=alone, texts=size)


def _paced(model: Model, size: int) -> Model:
    """Return the model with a drafter that follows the costs of a batch; others stay as fixed."""
    drafter = model.drafter
    if not isinstance(drafter, AdaptiveDrafter):
        return model
    costs = _batch_calibrator(model, size).costs
    again = paced(drafter.drafter, costs, lookup=drafter.lookup, trees=drafter.trees)
    return replace(model, drafter=again)
