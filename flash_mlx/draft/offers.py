"""What an adaptive drafter offers, and what it remembers: of a text, and of earlier texts.

Shapes:
    A: rows accepted in a round.    R: rows of a prompt.    D: hidden size.    N: rows of a tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import mlx.core as mx
import numpy as np

from flash_mlx.cost import Costs
from flash_mlx.decode import ROOT_ALONE, Drafter
from flash_mlx.draft.drafter import FlashDrafter
from flash_mlx.draft.ngram import NgramState
from flash_mlx.draft.sources import outcomes_of, value
from flash_mlx.draft.unseen import chain_value, outcomes_of_chain, outcomes_of_shape
from flash_mlx.pace import Pace
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree, Node, Topology

Entry = TypeVar("Entry")


class CostsOf(Protocol):
    """Where costs come from; see `calibrate.Calibrator.costs`."""

    def __call__(self, num_rows: int, *, greedy: bool) -> Costs:
        """Return the costs with about so many rows in the cache."""
        ...


@dataclass(frozen=True, eq=False)
class Offer:
    """What was drafted from a state.

    Attributes:
        pace: That decided it.
        main: The drafter's state, all rows read; None if it has not read them.
        lookup: The text's own drafts, all tokens read; None without them, or if nobody asked.
        nodes: Rows 1, 2, ... of the tree. None: a chain drawn on the device.
        drafts: [N] int32, drawn on the device in the shape of `nodes`; None: the host knows the
            drafts, and a node's `kind` is its kind and its forecast.
        depth: Drafted ahead by the drafter.
        kept: Of these, in the tree, if nobody looked at them.
        rows: Of the tree.
        ahead: Whether it was the root alone, read as plain decoding reads it.
    """

    pace: Pace
    main: Any = None
    lookup: NgramState | None = None
    nodes: tuple[Node, ...] | None = ()
    drafts: mx.array | None = None
    depth: int = 0
    kept: int = 0
    rows: int = 1
    ahead: bool = False


@dataclass(frozen=True, eq=False)
class Log(Generic[Entry]):
    """What came so far, in order; a value. Logs that grew from one another share a list.

    Attributes:
        entries: Holds this log in its first `length`, and later entries of others.
        length: Entries of this log.
    """

    entries: list[Entry] = field(default_factory=list)
    length: int = 0

    def __len__(self) -> int:
        """Return the number of entries."""
        return self.length

    def __iter__(self) -> Iterator[Entry]:
        """Go through the entries."""
        return islice(self.entries, self.length)

    def then(self, entry: Entry) -> Log[Entry]:
        """Return the log with one entry more, which takes as long however many there are."""
        entries = self.entries
        if len(entries) != self.length:  # another went on differently
            entries = entries[: self.length]
        entries.append(entry)
        return Log(entries, self.length + 1)


@dataclass(frozen=True, eq=False)
class AdaptiveState:
    """What is known of a text; a value but for `offers`.

    Attributes:
        main: The drafter's state, before the rows of `prompt` and `unread`; None without a drafter,
            or if it has read nothing.
        prompt: Rows of the prompt that the drafter has not read: prompt, first row, hidden [R, D].
        unread: Hidden rows [A, D] of the target and the tokens after them, round by round.
        lookup: The text's own drafts, before the tokens of `said`; None without them.
        said: Tokens after the prompt that `lookup` has not read, round by round.
        num_rows: Of the prompt.
        last: The last round's offer, without `main`, and the tokens that the round brought; None
            before the first round. During a pause: of the first round of it.
        paused: Rounds of a pause that are over; 0 if there is none.
        held: Numbers in the rows of `unread`.
        offers: What `draft` made of this state last, for `extend`: none or one.
    """

    main: Any
    unread: Log[tuple[mx.array, tuple[int, ...]]]
    lookup: NgramState | None
    said: Log[tuple[int, ...]]
    num_rows: int
    prompt: tuple[tuple[Prompt, int, mx.array], ...] = ()
    last: tuple[Offer, tuple[int, ...]] | None = None
    paused: int = 0
    held: int = 0
    offers: list[Offer] = field(default_factory=list)


@dataclass(eq=False)
class Memory:
    """What became of the drafts of earlier greedy texts, for the greedy texts that follow.

    A drafter that was of no use then is tried less now. Sampled texts neither read nor change it:
    they depend on how much is drafted, so the same seed must begin with the same knowledge.

    Attributes:
        last: See `AdaptiveState`; of the text that went on last. None before the first.
        paused: Likewise.
    """

    last: tuple[Offer, tuple[int, ...]] | None = None
    paused: int = 0

    def carried(self, costs: Costs, *, late: bool = False) -> Pace | None:
        """Return the pace that the next text begins with, if there was one; see `Pace.carried`."""
        if self.last is None:
            return None
        return noted(*self.last, self.paused).carried(costs, late=late)


def asked(
    drafter: Drafter[Any], offer: Offer, pace: Pace, root: int, sampler: Sampler, key: mx.array
) -> tuple[list[Offer], DraftTree]:
    """Return drafts of the drafter's that nobody looks at, and what they turned out to be."""
    if isinstance(drafter, FlashDrafter):
        topology = Topology.chain(offer.depth) if offer.nodes is None else _tree(offer.nodes)
        tree = drafter.draft(root, offer.main, sampler, key, topology)
        drafted = max(topology.depth)
    else:
        tree = drafter.draft(root, offer.main, sampler, key)
        rows, drafted = 1 + offer.depth, max(tree.topology.depth)
        if not tree.topology.is_chain:  # its likeliest rows come first
            rows = next((m for m in range(len(tree), 1, -1) if pace.affords(m, drafted)), 1)
        tree = tree.head(rows)  # what is left out was paid for
    drafts, kept = None if offer.nodes is None else tree.tokens, max(tree.topology.depth)
    return [replace(offer, drafts=drafts, depth=drafted, kept=kept, rows=len(tree))], tree


def _tree(nodes: Sequence[Node]) -> Topology:
    """Return the shape of a tree with these drafts."""
    return Topology((-1, *(node.parent for node in nodes)))


def looked_at(root: int, offer: Offer, state: AdaptiveState) -> DraftTree:
    """Return the tree of drafts that the host knows."""
    state.offers[:] = [offer]
    nodes = offer.nodes or ()
    tokens = mx.array([root, *(node.path[-1] for node in nodes)], dtype=mx.int32)
    return DraftTree(_tree(nodes), tokens, lookahead=offer.ahead)


def unseen_value(pace: Pace, offer: Offer) -> float:
    """Return the value of drafts that nobody looks at."""
    if offer.nodes is None:
        return chain_value(pace, offer.depth)
    return value(pace, offer.nodes, offer.depth)


def noted(offer: Offer, tokens: tuple[int, ...], paused: int) -> Pace:
    """Return the pace after the round of an offer, which brought these tokens, or after a pause."""
    pace = offer.pace
    if offer.ahead:
        return pace.parked(max(1, paused))
    if offer.nodes is None:
        outcomes = outcomes_of_chain(pace, offer.kept, tokens)
    elif offer.drafts is not None:
        drafts = np.asarray(offer.drafts).tolist()  # read already, so nothing waits
        outcomes = outcomes_of_shape(pace, offer.nodes, drafts, tokens)
    else:
        outcomes = outcomes_of(offer.nodes, tokens)
    return pace.after(len(tokens), offer.rows, offer.depth, outcomes)


def parked(root: int, left: int) -> DraftTree:
    """Return the root alone, read as plain decoding reads it, for this round and others."""
    alone = mx.array([root], dtype=mx.int32)
    return DraftTree(ROOT_ALONE, alone, lookahead=left > 1, parked=True)


def broken(root: int) -> DraftTree:
    """Return a tree that says that its drafter is broken; see `guard`."""
    return DraftTree(Topology.chain(1), mx.array([root, -1], dtype=mx.int32))
