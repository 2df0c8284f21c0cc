"""Measuring what rounds and drafts cost here, once, and remembering it.

Measured is the loop itself: rounds of `decode` on a cache of zeros, with junk drafts, for longer
where times scatter (`BUDGET`, `PATIENCE`). What was found is stored, one small file for each
machine, model, precision and range of context lengths, and whoever stored it first is believed:
two processes that measure at once then go on alike, and a sampled text is the same the next time.

Shapes:
    V: vocabulary.    D: hidden size.    m: rows of a tree.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from flash_mlx.around import TargetAround
from flash_mlx.cost import Costs
from flash_mlx.decode import ROOT_ALONE, Cache, Drafter, NoDrafter, Output, Take, Target, decode
from flash_mlx.draft.adaptive import WIDTH
from flash_mlx.draft.drafter import FlashDrafter
from flash_mlx.draft.stepwise import StepwiseDrafter
from flash_mlx.draft.stored import machine, read_costs, store_costs
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree, Topology

ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
MORE_ROWS = (24, 32)  # where 16 rows cost less than twice one
CONTEXTS = (256, 1024, 4096, 8192)  # rows in the cache
BUDGET = 0.1  # for each of rounds and drafts, beyond the least that must be measured [s]
PATIENCE = 0.5  # instead of it, while the best two times of a point are not alike [s]
ALIKE = 1.1  # the second-best time of a point over its best
LEAST_TURNS, MOST_TURNS = 3, 12  # the first is a warm-up
LONGEST = 2.0  # for all of a curve, after which the machine must be busy with something else [s]
NOISE = 1.5  # likewise; what is above it is not worth remembering
SPARE_ROWS = 8  # of the context, for the tokens that a measurement emits
TOO_DEAR = 4  # times one row: more rows than those that cost this never pay
PLAIN_TOKENS = 4
GREEDY = Sampler()

# For sampled texts where nothing can be stored: a guess, but the same guess each time.
NOMINAL = Costs(1.0, ((1, 1.05), (16, 1.95)), ((1, 0.15), (8, 0.3)))


class Scratch(Cache, Protocol):
    """A cache that can go back to its first rows."""

    def rewind(self, length: int) -> None:
        """Forget all rows but the first `length`."""
        ...


@dataclass(frozen=True, eq=False)
class Calibrator:
    """Knows what rounds and drafts cost for one target and drafter.

    Attributes:
        target: Whose passes are measured.
        scratch: Returns a cache of so many rows.
        weights: The target's; their names, shapes and types are what its costs are stored under.
        drafter: Whose drafts are measured; None if drafting costs nothing.
        more: What else the costs depend on, and are stored under.
    """

    target: Target
    scratch: Callable[[int], Scratch]
    weights: nn.Module
    drafter: Drafter[Any] | None
    more: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    _known: dict[tuple[int, bool], tuple[Costs, bool]] = field(
        default_factory=dict, init=False, repr=False
    )

    def costs(self, num_rows: int, *, greedy: bool) -> Costs:
        """Return the costs with about so many rows in the cache, measured if they are not known.

        Where the machine was too busy to measure well, greedy texts measure again the next time.
        Sampled texts depend on how much is drafted, so theirs are stored once and for all, that the
        same seed give the same text; on a busy machine they are measured twice before. Where
        nothing can be stored they are `NOMINAL`.

        Args:
            num_rows: Of the prompt.
            greedy: Whether the text is.
        """
        context = self._context(num_rows)
        if (context, greedy) not in self._known:
            key = {
                **machine(),
                **self.more,
                "context": str(context),
                "target": _shape_of(self.weights),
                "drafter": _kind_of(self.drafter),
                "text": "greedy" if greedy else "sampled",
            }
            found = read_costs(key)
            if found is None:
                measure = self._measure if greedy else self._measure_for_good
                costs, worth = measure(context)
                worth = worth and len(costs.rounds) > 1
                found = store_costs(costs, key) if worth else None
            self._known[context, greedy] = (found or costs, found is not None)
        costs, stored = self._known[context, greedy]
        # One point says nothing of what more rows cost.
        return costs if (stored or greedy) and len(costs.rounds) > 1 else NOMINAL

    def _context(self, num_rows: int) -> int:
        """Return for how many rows in the cache costs are measured, for a prompt of so many."""
        limit = self.target.max_context
        fits = [c for c in CONTEXTS if limit is None or c + MORE_ROWS[-1] + SPARE_ROWS <= limit]
        least = 16 if limit is None else max(2, min(16, limit // 2))
        return max((c for c in fits if c <= num_rows), default=min(fits, default=least))

    def _measure_for_good(self, context: int) -> tuple[Costs, bool]:
        """Return the costs of greedy texts, measured a second time if these were not steady."""
        self.costs(context, greedy=True)
        costs, stored = self._known[context, True]
        return (costs if stored else costs.least(self._measure(context)[0])), True

    def _measure(self, context: int) -> tuple[Costs, bool]:
        """Return the costs, and whether they are worth remembering."""
        limit = self.target.max_context
        room = math.inf if limit is None else limit - context - SPARE_ROWS
        counts, more = ([m for m in each if m <= max(1, room)] for each in (ROWS, MORE_ROWS))
        target = _Resumed(self.target, self.scratch(context))
        rounds, steady = fastest({rows: _round(target, rows) for rows in counts})
        if more and rounds.get(ROWS[-1], math.inf) < 2 * rounds[1]:
            further, still = fastest({rows: _round(target, rows) for rows in more})
            rounds, steady = rounds | further, steady and still
        plain, still = fastest({PLAIN_TOKENS: _plain(target)})
        steady = steady and still
        drafts: dict[int, float] = {}
        if self.drafter is not None:
            drafts, still = fastest(_drafts(self.drafter, self._hidden_size()))
            steady = steady and still
        # A pass that is queued ahead cannot take longer than one that is waited for.
        each = min(plain[PLAIN_TOKENS] / PLAIN_TOKENS, *rounds.values())
        return Costs(each, tuple(rounds.items()), tuple(drafts.items())), steady

    def _hidden_size(self) -> int:
        """Return the width of the rows that the drafter reads; some read several layers."""
        tree = DraftTree(ROOT_ALONE, mx.zeros((1,), dtype=mx.int32))
        return self.target.verify(tree, self.target.make_cache()).hidden.shape[1]


def fastest(runs: Mapping[int, Callable[[], float]]) -> tuple[dict[int, float], bool]:
    """Take the runs in turns and return the least time of each [s]: noise only ever adds.

    Args:
        runs: By count, ascending; those after the first that is `TOO_DEAR` are left out.

    Returns:
        Count to time, of one count at least; and whether the times are steady.
    """
    times: dict[int, list[float]] = {}
    start = time.perf_counter()
    for turn in range(MOST_TURNS):
        if turn == 1:
            start = time.perf_counter()  # what is done once and never again does not count
        spent = time.perf_counter() - start
        enough = LONGEST if turn < LEAST_TURNS else BUDGET if _spread(times) <= ALIKE else PATIENCE
        if turn > 1 and spent > enough:
            break
        for count in list(runs if turn < 2 else times):
            seconds = runs[count]()
            if turn:
                times.setdefault(count, []).append(seconds)
            dear = turn == 1 and seconds > TOO_DEAR * min(map(min, times.values()))
            if dear or time.perf_counter() - start > LONGEST:
                break
    return {count: min(each) for count, each in times.items()}, _spread(times) <= NOISE


def _spread(times: Mapping[int, list[float]]) -> float:
    """Return the second-best time over the best, of the point where that is most."""
    best = (sorted(each) for each in times.values())
    apart = (each[1] / each[0] if len(each) > 1 else math.inf for each in best)
    return max(apart, default=math.inf)


def _drafts(drafter: Drafter[Any], hidden_size: int) -> dict[int, Callable[[], float]]:
    """Return what times drafts, by depth; each reads one row and waits for its drafts.

    A drafter that cannot be told how far to draft always drafts what it does.
    """
    rows = mx.zeros((CONTEXTS[0], hidden_size))
    before = drafter.prefill(Prompt((0,) * len(rows)), rows, 0)
    key = mx.random.key(0)

    def seconds(depth: int) -> float:
        start = time.perf_counter()
        state = drafter.extend(rows[:1], (0,), before)
        if isinstance(drafter, FlashDrafter):
            found = drafter.candidates(state, depth, WIDTH)
            mx.eval(found.tokens, found.logprobs)
        else:
            mx.eval(drafter.draft(0, state, GREEDY, key).tokens)
        return time.perf_counter() - start

    if isinstance(drafter, FlashDrafter):
        block = drafter.block_size  # beyond it, a second pass begins
        return {n: partial(seconds, n) for n in sorted({1, block, block + 1, drafter.reach})}
    deepest = max(drafter.draft(0, before, GREEDY, key).topology.depth)
    return {max(1, deepest): partial(seconds, deepest)}


def _round(target: Target, rows: int) -> Callable[[], float]:
    """Return what times a round over a chain of so many rows."""
    return lambda: _rounds(target, Junk(Topology.chain(rows - 1)), 0, 1)


def _plain(target: Target) -> Callable[[], float]:
    """Return what times plain decoding, once its passes are queued ahead."""
    return lambda: _rounds(target, NoDrafter(), 1, PLAIN_TOKENS)


def _rounds(target: Target, drafter: Drafter[Any], skip: int, count: int) -> float:
    """Return the time of `count` rounds after the first `skip` [s]."""
    rounds = decode(
        target,
        drafter,
        Prompt((0,)),
        sampler=GREEDY,
        key=mx.random.key(0),
        max_tokens=10_000,
        stop_ids=(),
    )
    for _ in range(1 + skip):
        next(rounds)
    start = time.perf_counter()
    for _ in range(count):
        next(rounds)
    return time.perf_counter() - start


class Junk(NoDrafter):
    """Drafts the root's token over and over, in a chain."""

    def __init__(self, topology: Topology) -> None:
        """Draft this chain."""
        self._topology = topology

    def draft(self, root: int, state: None, sampler: Sampler, key: mx.array) -> DraftTree:  # noqa: ARG002
        """See `Drafter`."""
        return DraftTree(self._topology, mx.full((len(self._topology),), root, dtype=mx.int32))


class _Resumed(TargetAround):
    """A target whose prompt has been read already, into a cache that all texts share."""

    def __init__(self, target: Target, cache: Scratch) -> None:
        super().__init__(target)
        self._cache, self._length = cache, cache.length

    def make_cache(self) -> Cache:
        self._cache.rewind(self._length)  # or the context would be full after a few texts
        return self._cache

    def prefill(self, prompt: Prompt, cache: Cache, take: Take | None = None) -> Output:  # noqa: ARG002
        return Output(mx.zeros((1, self.vocab_size)), mx.zeros((1, self.hidden_size)))


def _shape_of(module: nn.Module) -> str:
    """Return a digest of what a pass costs: names, shapes and types of all weights."""
    weights: Any = tree_flatten(module.parameters())
    shapes = [(name, weight.shape, str(weight.dtype)) for name, weight in weights]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def _kind_of(drafter: Drafter[Any] | None) -> str:
    """Return what tells a drafter from those that cost something else."""
    if isinstance(drafter, FlashDrafter):
        return f"{_shape_of(drafter.model)} {drafter.block_size} {WIDTH}"
    if isinstance(drafter, StepwiseDrafter):
        return f"{_shape_of(drafter.model)} {drafter.model.config}"
    return "none" if drafter is None else type(drafter).__qualname__
