"""Drafts that nobody looks at before the target has read them: how many, and in what shape.

A shape follows from what became of earlier drafts, slot by slot (`pace.Pace`), and so it may be
chosen for drafts that are drawn at random, whose law must not depend on what was drawn. A slot's
further choices, its *spares*, are worth a row where the first is often refused and rows are cheap.

A draft's path is written in ranks: (0, 0, 1) is the second choice for the third slot, after the
first choices for the others.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise

from flash_mlx.draft.sources import Expand, Outcomes, prune, value
from flash_mlx.pace import Pace
from flash_mlx.tree import Node, best_first


def chain_value(pace: Pace, depth: int) -> float:
    """Return the value of a chain that is drafted so far ahead."""
    return pace.value(sum(pace.hopes(depth)), 1 + depth, depth)


def shape(pace: Pace, depth: int, width: int, free: int) -> tuple[Node, ...] | None:
    """Return the drafts of the tree that is worth most; None if that is the chain of `depth`.

    Args:
        pace: What is known.
        depth: Drafted ahead.
        width: Choices that a slot may have, at most.
        free: Slots whose law holds whatever was drafted before. Those after it go on from first
            choices alone.
    """
    if width == 1 or not _spares_may_pay(pace, depth):
        return None
    limit = pace.costs.rounds[-1][0] - 1
    nodes = prune(pace, best_first(_choices(pace, depth, width, free), limit), depth)
    return nodes if value(pace, nodes, depth) > chain_value(pace, depth) else None


def _spares_may_pay(pace: Pace, depth: int) -> bool:
    """Whether one row more for the best spare may be worth its time: a quick answer, mostly no."""
    hopes = (1.0, *pace.hopes(depth))
    best = max((above - hope for above, hope in pairwise(hopes)), default=0.0)
    row = pace.costs.round(2 + depth) - pace.costs.round(1 + depth)
    return best * pace.rate(("spare", 1)).accepted > max(1.0, pace.gain) * row


def _choices(pace: Pace, depth: int, width: int, free: int) -> Expand:
    """Return what may follow a path of ranks, and how likely it is accepted."""

    def expand(path: tuple[int, ...]) -> Iterable[tuple[int, float, Hashable]]:
        slot = len(path)
        if slot >= depth or (slot >= free and any(path)):
            return
        kind: Hashable = ("draft", slot)
        prob = pace.rate(kind).accepted
        left = 1 - prob
        yield 0, prob, kind
        for rank in range(1, width):
            kind = ("spare", rank)
            share = left * pace.rate(kind).accepted
            left -= share
            prob = min(prob, share)  # an elder comes first in the tree
            yield rank, prob, kind

    return expand


def outcomes_of_chain(pace: Pace, depth: int, tokens: tuple[int, ...]) -> Outcomes:
    """Return what became of a chain that is `depth` long, in a round that brought these tokens.

    Nobody looked at its drafts, so their forecasts are what was known of their slots.
    """
    right = len(tokens) - 1
    kinds = [("draft", slot) for slot in range(min(depth, 1 + right))]
    return {kind: [(pace.rate(kind).accepted, kind[1] < right)] for kind in kinds}


def outcomes_of_shape(
    pace: Pace, nodes: Sequence[Node], drafts: Sequence[int], tokens: tuple[int, ...]
) -> Outcomes:
    """Return what became of a tree that nobody had looked at.

    Args:
        pace: That chose it.
        nodes: From `shape`; node i is row i + 1.
        drafts: What was drafted, row by row, the root first.
        tokens: That the round brought.
    """
    outcomes: Outcomes = {}
    row = 0
    for said in tokens:
        reached = row
        for child, node in enumerate(nodes, start=1):
            if node.parent != reached:
                continue
            kind, hit = node.kind, drafts[child] == said
            outcomes.setdefault(kind, []).append((pace.rate(kind).accepted, hit))
            if hit:
                row = child
                break
        if row == reached:
            break
    return outcomes
