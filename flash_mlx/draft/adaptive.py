"""Drafting as much as pays: another drafter's drafts and the text's own, in one tree.

`AdaptiveDrafter` asks `pace.Pace` how far ahead to draft, lets its drafter do that, adds what the
text so far suggests (`ngram`), and of all these drafts verifies as many as raise the tokens per
second. Where drafting does not pay it pauses: the target decodes plainly, reading ahead, and the
rows that the drafter has not read are kept until it is asked again. How long is decided as a pause
begins, so that its rounds cost the host what those of plain decoding do.

Greedy drafts may be looked at: the host waits for them and grows the tree from them
(`tree.best_first`). That is a second wait in a round, so it is done only where a wait is cheap
beside the round (`pace.Pace.looks`), and not for a block that is likely to be accepted as a whole,
beside which the text's own drafts are not considered either.
Sampled drafts are never looked at, for nothing may depend on how likely they were. How many drafts
nobody looks at there are, by one pass of the drafter or two, and with which siblings, follows from
what became of earlier ones (`unseen`). Or else the drafts are the text's own.

Shapes:
    A: rows accepted in a round.    D: hidden size.    n: slots.    W: tokens a slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import mlx.core as mx

from flash_mlx.decode import Drafter, ReadingDrafter
from flash_mlx.draft.drafter import FlashDrafter, FlashState
from flash_mlx.draft.explained import explain
from flash_mlx.draft.ngram import PATIENCE, NgramDrafter, NgramState
from flash_mlx.draft.offers import (
    AdaptiveState,
    CostsOf,
    Log,
    Memory,
    Offer,
    asked,
    broken,
    looked_at,
    noted,
    parked,
    unseen_value,
)
from flash_mlx.draft.sources import Expand, following, grown, slots, value
from flash_mlx.draft.unseen import shape
from flash_mlx.pace import NO_LIMIT, PRIOR, Pace
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree, Node

WIDTH = 3  # tokens that a slot may bring
SURE = 0.4  # a whole block this likely to be accepted is verified without a look at its drafts
NO_ROWS = mx.zeros((0, 1))
KEPT = 2**24  # numbers in rows that are kept for a parked drafter: 64 MiB


class AdaptiveDrafter:
    """Drafts as much as pays; implements `decode.Drafter[AdaptiveState]`.

    Args:
        drafter: Drafts from a model; None drafts from the text alone.
        costs: What rounds and drafts cost.
        lookup: Drafts from the text; None leaves that out.
        trees: Whether the target verifies trees with siblings.
        memory: Of the caller's, for as long as texts are of one kind; None: each begins anew.
    """

    def __init__(
        self,
        drafter: Drafter[Any] | None,
        costs: CostsOf,
        *,
        lookup: NgramDrafter | None = None,
        trees: bool = True,
        memory: Memory | None = None,
    ) -> None:
        """Keep what drafts."""
        self.drafter, self.lookup, self.costs, self.trees = drafter, lookup, costs, trees
        self.memory = memory

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> AdaptiveState:
        """Let all read the prompt; see `Drafter`."""
        main = None if self.drafter is None else self.drafter.prefill(prompt, hidden, root)
        lookup = None if self.lookup is None else self.lookup.prefill(prompt, hidden, root)
        return AdaptiveState(main, Log(), lookup, Log(), len(prompt))

    def draft(self, root: int, state: AdaptiveState, sampler: Sampler, key: mx.array) -> DraftTree:
        """Return the drafts that pay, the root alone if none do; see `Drafter`.

        Costs that are not known yet are measured now.
        """
        if state.paused and state.last is not None:
            left = state.last[0].pace.wait - state.paused
            if left > 0:  # as was decided when the pause began
                return parked(root, left)
        main: Any = self._read(state) if self._goes_on(state) else None
        if isinstance(main, FlashState):
            mx.async_eval(main.slots)  # the device reads while the host decides
        pace = self._pace(state, greedy=sampler.greedy)
        if pace.wait:  # the text is read when it is asked for drafts again
            state.offers[:] = [Offer(pace, main, ahead=True)]
            return parked(root, pace.wait)
        reach, drafter = self._reach(pace), self.drafter
        main = self._read(state) if reach and main is None else main
        block = drafter.block_size if isinstance(drafter, FlashDrafter) else NO_LIMIT
        sure = reach >= block and pace.hopes(block)[-1] >= SURE
        if drafter is not None and sure:  # what the text suggests would hardly be better
            unseen = Offer(pace, main, nodes=self._shape(pace, reach), depth=reach)
            state.offers[:], tree = asked(drafter, unseen, pace, root, sampler, key)
            return tree
        lookup = self._heard(state)
        looks = sampler.greedy and pace.looks(reach)
        if reach and looks and isinstance(drafter, FlashDrafter):
            candidates = slots(drafter.candidates(main, reach, WIDTH if self.trees else 1))
            if candidates is None:
                state.offers[:] = [Offer(pace, main, lookup)]
                return broken(root)
            return looked_at(root, self._grow(pace, main, lookup, reach, candidates), state)
        offer = self._grow(pace, main, lookup)
        if drafter is not None and not reach and not offer.nodes:
            # Nothing can pay, and a root alone is not worth the wait for what it brings.
            pace = pace.rested()
            state.offers[:] = [Offer(pace, main, lookup, ahead=True)]
            return parked(root, pace.wait)
        if drafter is None or not reach:
            return looked_at(root, offer, state)
        unseen = Offer(pace, main, lookup, self._shape(pace, reach), depth=reach)
        if offer.nodes and value(pace, offer.nodes, 0) > unseen_value(pace, unseen):
            return looked_at(root, offer, state)
        state.offers[:], tree = asked(drafter, unseen, pace, root, sampler, key)
        return tree

    def extend(
        self, hidden: mx.array, tokens: tuple[int, ...], state: AdaptiveState
    ) -> AdaptiveState:
        """Take note of a round; see `Drafter`. The drafter reads it when it is asked again."""
        lookup, last, said, paused = state.lookup, state.last, state.said, state.paused
        main, prompt, unread, held = state.main, state.prompt, state.unread, state.held
        if state.offers:  # the last row of a prompt comes without a draft, as do those of a pause
            (offer,) = state.offers
            if offer.lookup is not None:
                lookup, said = offer.lookup, Log()
            if offer.main is not None:
                main, prompt, unread, held = offer.main, (), Log(), 0
            last, paused = (replace(offer, main=None, lookup=None), tokens), 0
            if offer.pace.wait:
                paused = 1
        elif paused:
            paused += 1
        if self.lookup is not None:
            said = said.then(tokens)
        if self.drafter is not None:
            unread, held = unread.then((hidden, tokens)), held + hidden.size
        if held > KEPT:
            main = self._read(replace(state, main=main, prompt=prompt, unread=unread))
            prompt, unread, held = (), Log(), 0
        if last is not None and self.memory is not None and last[0].pace.greedy:
            self.memory.last, self.memory.paused = last, paused
        return AdaptiveState(main, unread, lookup, said, state.num_rows, prompt, last, paused, held)

    def explain(self, num_rows: int, outcomes: Mapping[tuple[int, int], int], parked: int) -> str:
        """Return in a line how much was drafted of a text, and why; see `explained.explain`."""
        return explain(self.costs(num_rows, greedy=True), outcomes, parked)

    def _pace(self, state: AdaptiveState, *, greedy: bool) -> Pace:
        """Return what is known before the next draft."""
        costs, memory = self.costs(state.num_rows, greedy=greedy), self.memory
        if state.last is not None:
            pace = noted(*state.last, state.paused)
            return pace if pace.costs is costs else replace(pace, costs=costs).settled()
        known = memory if greedy else None
        carried = None if known is None else known.carried(costs, late=bool(state.prompt))
        if carried is not None:
            return carried
        block = self.drafter.block_size if isinstance(self.drafter, FlashDrafter) else NO_LIMIT
        remembered, belief = known is not None, belief_in(self.drafter)
        return Pace.begin(costs, belief, block, greedy=greedy, remembered=remembered).settled()

    def _goes_on(self, state: AdaptiveState) -> bool:
        """Whether drafts are sure enough to be asked for that the drafter may read at once."""
        offer, tokens = state.last or (None, ())
        return offer is not None and offer.depth > 0 and len(tokens) > 1

    def _reach(self, pace: Pace) -> int:
        """Return how far the drafter shall draft; 0: not at all."""
        if self.drafter is None or not pace.costs.drafts:
            return 0
        limit = measured = pace.costs.drafts[-1][0]
        if isinstance(self.drafter, FlashDrafter):
            block = self.drafter.block_size  # one more pass only where its cost was measured
            limit = block if measured <= block else min(measured, self.drafter.reach)
        return pace.reach(limit)

    def _read(self, state: AdaptiveState) -> Any:
        """Return the drafter's state once it has read the rows that it was not shown yet."""
        main, drafter = state.main, self.drafter
        for prompt, start, hidden in state.prompt:
            if isinstance(drafter, ReadingDrafter):
                main = drafter.read(prompt, start, hidden, main)
        if not state.unread or drafter is None:
            return main
        rows = [rows for rows, _ in state.unread]
        tokens = tuple(chain.from_iterable(said for _, said in state.unread))
        return drafter.extend(rows[0] if len(rows) == 1 else mx.concatenate(rows), tokens, main)

    def _heard(self, state: AdaptiveState) -> NgramState | None:
        """Return the text's own drafts once all tokens are read."""
        if self.lookup is None or state.lookup is None or not state.said:
            return state.lookup
        return self.lookup.extend(NO_ROWS, tuple(chain.from_iterable(state.said)), state.lookup)

    def _shape(self, pace: Pace, reach: int) -> tuple[Node, ...] | None:
        """Return the tree to draft unseen; None: a chain."""
        if not self.trees or not isinstance(self.drafter, FlashDrafter):
            return None
        return shape(pace, reach, WIDTH, self.drafter.free)

    def _grow(
        self,
        pace: Pace,
        main: Any,
        lookup: NgramState | None,
        depth: int = 0,
        candidates: Expand | None = None,
    ) -> Offer:
        """Return the tree of the drafts that pay best."""
        sources = [candidates] if candidates else []
        if lookup is not None and lookup.drafts:
            sources.append(following(lookup))
        nodes = grown(pace, sources, depth, trees=self.trees)
        idle = self.drafter is None and lookup is not None and lookup.misses >= PATIENCE
        ahead = idle and not nodes
        return Offer(pace, main, lookup, nodes, depth=depth, rows=1 + len(nodes), ahead=ahead)


class ReadingAdaptiveDrafter(AdaptiveDrafter):
    """One whose drafter reads a prompt with the target; see `decode.ReadingDrafter`."""

    def read(
        self, prompt: Prompt, start: int, hidden: mx.array, state: AdaptiveState | None
    ) -> AdaptiveState:
        """Let all read further rows of a prompt.

        A drafter that may never be asked keeps the rows for later, unless they are so many that
        they had better go.
        """
        main, lookup = (None, None) if state is None else (state.main, state.lookup)
        kept = () if state is None else state.prompt
        if isinstance(self.drafter, ReadingDrafter):
            kept = (*kept, (replace(prompt, inputs={}), start, hidden))  # no pixels
            if not self._rests() or sum(rows.size for _, _, rows in kept) > KEPT:
                for piece in kept:
                    main = self.drafter.read(*piece, main)
                kept = ()
            else:
                mx.async_eval(hidden)  # or it would hold on to the target's pass
        if self.lookup is not None:
            lookup = self.lookup.read(prompt, start, hidden, lookup)
        return AdaptiveState(main, Log(), lookup, Log(), len(prompt), kept)

    def _rests(self) -> bool:
        """Whether greedy texts of late say that a new one is hardly drafted for.

        By the last one's costs: the target is reading, which is no time to measure others.
        """
        if self.memory is None or self.memory.last is None:
            return False
        pace = self.memory.carried(self.memory.last[0].pace.costs, late=True)
        return pace is not None and pace.rests

    def rewind(self, state: AdaptiveState, rows: int) -> AdaptiveState:
        """Return the state `rows` rows of text earlier, for `read` to go on from."""
        lookup, unread = self._heard(state), state.unread
        left = sum(len(tokens) for _, tokens in unread) - rows
        kept: Log[tuple[mx.array, tuple[int, ...]]] = Log()
        for hidden, tokens in unread:
            count = min(max(left - sum(len(said) for _, said in kept), 0), len(tokens))
            if count:
                kept = kept.then((hidden[:count], tokens[:count]))
        main = self._read(replace(state, unread=kept))
        if isinstance(self.drafter, ReadingDrafter) and left < 0:
            main = self.drafter.rewind(main, -left)
        if self.lookup is not None and lookup is not None:
            lookup = self.lookup.rewind(lookup, rows)
        return AdaptiveState(main, Log(), lookup, Log(), state.num_rows)


def paced(
    drafter: Drafter[Any] | None,
    costs: CostsOf,
    *,
    lookup: NgramDrafter | None = None,
    trees: bool = True,
    memory: Memory | None = None,
) -> AdaptiveDrafter:
    """Return a drafter that drafts as much as pays, reading prompts if the given one does.

    Args: see `AdaptiveDrafter`.
    """
    reads = drafter is None or isinstance(drafter, ReadingDrafter)
    kind = ReadingAdaptiveDrafter if reads else AdaptiveDrafter
    return kind(drafter, costs, lookup=lookup, trees=trees, memory=memory)


def belief_in(drafter: Drafter[Any] | None) -> float:
    """Return how often a drafter's drafts are accepted, as far as that is known."""
    if isinstance(drafter, FlashDrafter):
        return drafter.model.config.expected_acceptance
    return PRIOR


def unpaced(drafter: Drafter[Any] | None) -> Drafter[Any] | None:
    """Return the drafter that an adaptive one paces; any other as it is."""
    return drafter.drafter if isinstance(drafter, AdaptiveDrafter) else drafter
