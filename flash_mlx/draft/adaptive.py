"""Drafting as much as pays: another drafter's drafts and the text's own, in one tree.

`AdaptiveDrafter` asks `cost.Pace` how far ahead to draft, lets its drafter do that, adds what the
text so far suggests (`ngram`), and of all these drafts verifies as many as raise the tokens per
second. Where drafting does not pay it is parked: the target decodes plainly, reading ahead, and the
rows that the drafter has not read are kept until it is asked again.

Greedy, the drafts are known on the host, which grows the tree from them (`tree.best_first`); that
is the one time that drafting waits for the device. A block that is likely to be accepted as a whole
is not looked at. Sampled drafts are a chain, drawn from laws that
nobody looks at before deciding how long it is, or else the text's own.

Shapes:
    A: rows accepted in a round.    D: hidden size.    n: slots.    W: tokens a slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import mlx.core as mx

from flash_mlx.cost import PRIOR, Costs, Pace, explain
from flash_mlx.decode import ROOT_ALONE, Drafter, ReadingDrafter
from flash_mlx.draft.drafter import FlashDrafter
from flash_mlx.draft.ngram import PATIENCE, NgramDrafter, NgramState
from flash_mlx.draft.sources import (
    Expand,
    chain_value,
    following,
    merged,
    outcomes_of,
    outcomes_of_chain,
    prune,
    slots,
    value,
)
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree, Node, Topology, best_first

WIDTH = 3  # tokens that a slot may bring
SURE = 0.4  # a whole block this likely to be accepted is verified without a look at its drafts


class CostsOf(Protocol):
    """Where costs come from; see `calibrate.Calibrator.costs`."""

    def __call__(self, num_rows: int, *, greedy: bool) -> Costs:
        """Return the costs with about so many rows in the cache."""
        ...


@dataclass(frozen=True, eq=False)
class Offer:
    """What was drafted from a state.

    Attributes:
        pace: That decided it; None if nothing was asked for.
        main: The drafter's state, all rows read; None if it was not asked.
        nodes: Rows 1, 2, ... of the tree, if the host knows them; a node's `kind` is its kind and
            its forecast. None: drawn on the device.
        depth: Drafted ahead by the drafter.
        rows: Of the tree.
        ahead: Whether it was the root alone, read as plain decoding reads it.
    """

    pace: Pace | None
    main: Any = None
    nodes: tuple[Node, ...] | None = ()
    depth: int = 0
    rows: int = 1
    ahead: bool = False


@dataclass(frozen=True, eq=False)
class AdaptiveState:
    """What is known of a text; a value but for `offers`.

    Attributes:
        main: The drafter's state, before the rows of `unread`; None without a drafter.
        unread: Hidden rows [A, D] of the target and the tokens after them, round by round.
        lookup: The text's own drafts; None without them.
        pace: What became of earlier drafts; None before the first round.
        num_rows: Of the prompt.
        offers: What `draft` made of this state last, for `extend`: none or one.
    """

    main: Any
    unread: tuple[tuple[mx.array, tuple[int, ...]], ...]
    lookup: NgramState | None
    pace: Pace | None
    num_rows: int
    offers: list[Offer] = field(default_factory=list)


class AdaptiveDrafter:
    """Drafts as much as pays; implements `decode.Drafter[AdaptiveState]`.

    Args:
        drafter: Drafts from a model; None drafts from the text alone.
        costs: What rounds and drafts cost.
        lookup: Drafts from the text; None leaves that out.
        trees: Whether the target verifies trees with siblings.
    """

    def __init__(
        self,
        drafter: Drafter[Any] | None,
        costs: CostsOf,
        *,
        lookup: NgramDrafter | None = None,
        trees: bool = True,
    ) -> None:
        """Keep what drafts."""
        self.drafter, self.lookup, self.costs, self.trees = drafter, lookup, costs, trees

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> AdaptiveState:
        """Let all read the prompt; see `Drafter`."""
        main = None if self.drafter is None else self.drafter.prefill(prompt, hidden, root)
        lookup = None if self.lookup is None else self.lookup.prefill(prompt, hidden, root)
        return AdaptiveState(main, (), lookup, None, len(prompt))

    def draft(self, root: int, state: AdaptiveState, sampler: Sampler, key: mx.array) -> DraftTree:
        """Return the drafts that pay, the root alone if none do; see `Drafter`.

        Costs that are not known yet are measured now.
        """
        costs = self.costs(state.num_rows, greedy=sampler.greedy)
        if state.pace is None:
            pace = Pace.begin(costs, self._belief()).settled()
        else:
            pace = replace(state.pace, costs=costs).settled()
        if pace.wait:
            state.offers[:] = [Offer(pace, ahead=True)]
            alone = mx.array([root], dtype=mx.int32)
            return DraftTree(ROOT_ALONE, alone, lookahead=pace.wait > 1, parked=True)
        reach = self._reach(pace)
        main: Any = self._read(state) if reach else None
        if sampler.greedy and not reach:
            offer = self._grow(pace, None, 0, None, state.lookup)
        elif sampler.greedy and isinstance(self.drafter, FlashDrafter):
            if reach == self.drafter.block_size and pace.hope(reach) >= SURE:
                return self._ask(root, Offer(pace, main, None, reach), state, sampler, key)
            found = self.drafter.candidates(main, reach, WIDTH if self.trees else 1)
            candidates = slots(found)
            if candidates is None:
                state.offers[:] = [Offer(pace, main)]
                return _broken(root)
            offer = self._grow(pace, main, reach, candidates, state.lookup)
        else:
            offer = self._grow(pace, None, 0, None, state.lookup)
            if value(pace, offer.nodes or (), 0) <= chain_value(pace, reach):
                return self._ask(root, Offer(pace, main, None, reach), state, sampler, key)
        state.offers[:] = [offer]
        nodes = offer.nodes or ()
        topology = Topology((-1, *(node.parent for node in nodes)))
        tokens = mx.array([root, *(node.path[-1] for node in nodes)], dtype=mx.int32)
        return DraftTree(topology, tokens, lookahead=offer.ahead)

    def extend(
        self, hidden: mx.array, tokens: tuple[int, ...], state: AdaptiveState
    ) -> AdaptiveState:
        """Take note of a round; see `Drafter`. The drafter reads it when it is asked again."""
        # The last row of a prompt comes without a draft.
        offer = state.offers[0] if state.offers else Offer(None)
        if offer.pace is None:
            pace = state.pace
        elif offer.ahead:
            pace = offer.pace.parked(len(tokens))
        else:
            if offer.nodes is None:
                outcomes = outcomes_of_chain(offer.pace, offer.depth, tokens)
            else:
                outcomes = outcomes_of(offer.nodes, tokens)
            pace = offer.pace.after(len(tokens), offer.rows, offer.depth, outcomes)
        lookup = state.lookup
        if self.lookup is not None and lookup is not None:
            lookup = self.lookup.extend(hidden, tokens, lookup)
        main, unread = (state.main, state.unread) if offer.main is None else (offer.main, ())
        if self.drafter is not None:
            unread = (*unread, (hidden, tokens))
        return AdaptiveState(main, unread, lookup, pace, state.num_rows)

    def explain(self, num_rows: int, outcomes: Mapping[tuple[int, int], int]) -> str:
        """Return in a line how much was drafted of a text, and why; see `cost.explain`."""
        return explain(self.costs(num_rows, greedy=True), outcomes)

    def _belief(self) -> float:
        """Return how often the drafter's drafts are accepted, as far as that is known."""
        if isinstance(self.drafter, FlashDrafter):
            return self.drafter.model.config.expected_acceptance
        return PRIOR

    def _reach(self, pace: Pace) -> int:
        """Return how far the drafter shall draft; 0: not at all."""
        if self.drafter is None or not pace.costs.drafts:
            return 0
        measured = pace.costs.drafts[-1][0]
        drafter = self.drafter
        return pace.reach(drafter.block_size if isinstance(drafter, FlashDrafter) else measured)

    def _read(self, state: AdaptiveState) -> Any:
        """Return the drafter's state once it has read the rows that it was not shown yet."""
        if not state.unread or self.drafter is None:
            return state.main
        hidden = [rows for rows, _ in state.unread]
        tokens = tuple(token for _, said in state.unread for token in said)
        return self.drafter.extend(mx.concatenate(hidden), tokens, state.main)

    def _grow(
        self,
        pace: Pace,
        main: Any,
        depth: int,
        candidates: Expand | None,
        lookup: NgramState | None,
    ) -> Offer:
        """Return the tree of the drafts that pay best."""
        sources = [candidates] if candidates else []
        if lookup is not None and lookup.drafts:
            sources.append(following(lookup))
        limit = pace.costs.rounds[-1][0] - 1
        plans = [sources] if self.trees else [[source] for source in sources]
        grown = [best_first(merged(pace, plan), limit) for plan in plans]
        pruned = [prune(pace, nodes, depth) for nodes in grown]
        nodes = max(pruned, key=lambda each: value(pace, each, depth), default=())
        idle = self.drafter is None and lookup is not None and lookup.misses >= PATIENCE
        return Offer(pace, main, nodes, depth, 1 + len(nodes), ahead=idle and not nodes)

    def _ask(
        self, root: int, offer: Offer, state: AdaptiveState, sampler: Sampler, key: mx.array
    ) -> DraftTree:
        """Return a chain of the drafter's, drawn on the device."""
        drafter = self.drafter
        if drafter is None or offer.depth == 0:
            state.offers[:] = [replace(offer, main=None, nodes=())]
            return DraftTree(ROOT_ALONE, mx.array([root], dtype=mx.int32))
        if isinstance(drafter, FlashDrafter):
            chain = Topology.chain(offer.depth)
            tree = drafter.draft(root, offer.main, sampler, key, chain)
        else:
            tree = drafter.draft(root, offer.main, sampler, key)
            if tree.topology.is_chain:
                tree = tree.head(1 + offer.depth)
        depth = max(tree.topology.depth)
        state.offers[:] = [replace(offer, depth=depth, rows=len(tree))]
        return tree


def _broken(root: int) -> DraftTree:
    """Return a tree that says that its drafter is broken; see `guard`."""
    return DraftTree(Topology.chain(1), mx.array([root, -1], dtype=mx.int32))


class ReadingAdaptiveDrafter(AdaptiveDrafter):
    """One whose drafter reads a prompt with the target; see `decode.ReadingDrafter`."""

    def read(
        self, prompt: Prompt, start: int, hidden: mx.array, state: AdaptiveState | None
    ) -> AdaptiveState:
        """Let all read further rows of a prompt."""
        main, lookup = (None, None) if state is None else (state.main, state.lookup)
        if isinstance(self.drafter, ReadingDrafter):
            main = self.drafter.read(prompt, start, hidden, main)
        if self.lookup is not None:
            lookup = self.lookup.read(prompt, start, hidden, lookup)
        return AdaptiveState(main, (), lookup, None, len(prompt))

    def rewind(self, state: AdaptiveState, rows: int) -> AdaptiveState:
        """Return the state `rows` rows of text earlier, for `read` to go on from."""
        main, lookup = state.main, state.lookup
        left = sum(len(tokens) for _, tokens in state.unread) - rows
        if isinstance(self.drafter, ReadingDrafter):
            if left < 0:
                main = self.drafter.rewind(main, -left)
            for hidden, tokens in state.unread:
                kept = min(max(left, 0), len(tokens))
                if kept:
                    main = self.drafter.extend(hidden[:kept], tokens[:kept], main)
                left -= kept
        if self.lookup is not None and lookup is not None:
            lookup = self.lookup.rewind(lookup, rows)
        return AdaptiveState(main, (), lookup, None, state.num_rows)


def paced(
    drafter: Drafter[Any] | None,
    costs: CostsOf,
    *,
    lookup: NgramDrafter | None = None,
    trees: bool = True,
) -> AdaptiveDrafter:
    """Return a drafter that drafts as much as pays, reading prompts if the given one does.

    Args: see `AdaptiveDrafter`.
    """
    reads = drafter is None or isinstance(drafter, ReadingDrafter)
    kind = ReadingAdaptiveDrafter if reads else AdaptiveDrafter
    return kind(drafter, costs, lookup=lookup, trees=trees)


def unpaced(drafter: Drafter[Any] | None) -> Drafter[Any] | None:
    """Return the drafter that an adaptive one paces; any other as it is."""
    return drafter.drafter if isinstance(drafter, AdaptiveDrafter) else drafter
