"""Which drafts go into a tree, and what became of them.

A source says what may follow a path of drafts, and how likely it is. Forecasts are corrected by how
far off those of the same kind were so far (`pace.Rate`), and the tree holds the most likely paths,
as many as pay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import accumulate
from typing import cast

import mlx.core as mx
import numpy as np

from flash_mlx.draft.choice import Candidates
from flash_mlx.draft.ngram import NgramState
from flash_mlx.pace import Pace
from flash_mlx.tree import Node, best_first

# How often what followed n tokens the last time follows them again, before a text has said.
LOOKUP = (0.25, 0.45, 0.6, 0.7)

Expand = Callable[[tuple[int, ...]], Iterable[tuple[int, float, Hashable]]]
"""From a path of drafts to token, probability and kind of each draft that may follow."""

Outcomes = dict[Hashable, list[tuple[float, bool]]]
"""From a kind to forecast and acceptance of each draft whose parent was accepted."""


def slots(found: Candidates) -> Expand | None:
    """Return what follows a path according to a block's slots; None if they are not numbers.

    Waits for the device.
    """
    mx.eval(found.tokens, found.logprobs)
    tokens, logprobs = np.asarray(found.tokens), np.asarray(found.logprobs)
    if np.isnan(logprobs).any():
        return None
    order = np.argsort(-logprobs, axis=1, kind="stable")
    ids = np.take_along_axis(tokens, order, 1).tolist()
    probs = np.exp(np.take_along_axis(logprobs, order, 1)).tolist()
    spine = tuple(row[0] for row in ids)

    def expand(path: tuple[int, ...]) -> Iterable[tuple[int, float, Hashable]]:
        depth = len(path)
        if depth < len(ids) and (depth < found.free or path == spine[:depth]):
            for rank, (token, prob) in enumerate(zip(ids[depth], probs[depth], strict=True)):
                yield token, prob, ("sibling", rank) if rank else ("draft", depth)

    return expand


def following(lookup: NgramState) -> Expand:
    """Return what follows a path according to the text so far."""
    matched = min(lookup.matched, len(LOOKUP))

    def expand(path: tuple[int, ...]) -> Iterable[tuple[int, float, Hashable]]:
        depth = len(path)
        if depth < len(lookup.drafts) and lookup.drafts[:depth] == path:
            yield lookup.drafts[depth], LOOKUP[matched - 1], ("lookup", matched)

    return expand


def merged(pace: Pace, sources: Sequence[Expand]) -> Expand:
    """Return what follows a path according to any of the sources, with corrected forecasts."""

    def expand(path: tuple[int, ...]) -> Iterable[tuple[int, float, Hashable]]:
        found: dict[int, tuple[float, Hashable]] = {}
        for source in sources:
            for token, forecast, kind in source(path):
                prob = pace.rate(kind).correct(forecast)
                if token in found:  # two that agree
                    other, first = found[token]
                    found[token] = 1 - (1 - prob) * (1 - other), first
                else:
                    found[token] = prob, (kind, forecast)
        return ((token, prob, kind) for token, (prob, kind) in found.items())

    return expand


def grown(pace: Pace, sources: Sequence[Expand], depth: int, *, trees: bool) -> tuple[Node, ...]:
    """Return the tree of the drafts that pay best.

    Args:
        pace: What is known.
        sources: Of drafts.
        depth: Drafted ahead for them.
        trees: Whether one tree may hold drafts of several sources; else it is the best one's.
    """
    if not sources:
        return ()
    limit = pace.costs.rounds[-1][0] - 1
    plans = [sources] if trees else [[source] for source in sources]
    pruned = [prune(pace, best_first(merged(pace, plan), limit), depth) for plan in plans]
    return max(pruned, key=lambda nodes: value(pace, nodes, depth))


def prune(pace: Pace, nodes: tuple[Node, ...], depth: int) -> tuple[Node, ...]:
    """Return the leading nodes, as many as bring most tokens per second."""
    sums = accumulate((node.prob for node in nodes), initial=0.0)
    best, best_worth = 0, -math.inf
    for count, expected in enumerate(sums):
        worth = pace.value(expected, 1 + count, depth)
        if worth > best_worth and (count == 0 or pace.affords(1 + count, depth)):
            best, best_worth = count, worth
    return nodes[:best]


def value(pace: Pace, nodes: Sequence[Node], depth: int) -> float:
    """Return the value (`Pace.value`) of a tree, drafted so far ahead."""
    return pace.value(sum(node.prob for node in nodes), 1 + len(nodes), depth)


def outcomes_of(nodes: Sequence[Node], tokens: tuple[int, ...]) -> Outcomes:
    """Return what became of a tree's drafts in a round that brought these tokens."""
    outcomes: Outcomes = {}
    for node in nodes:
        *above, token = node.path
        place = len(above)
        if place < len(tokens) and tuple(above) == tokens[:place]:
            kind, forecast = cast(tuple[Hashable, float], node.kind)
            outcomes.setdefault(kind, []).append((forecast, token == tokens[place]))
    return outcomes
