"""Draft trees: a topology on the host, tokens on the device.

Row 0 is the root: the newest emitted token, which the target has not read yet. Every other row
is a draft for the token after its parent row. A chain is a tree without siblings, and plain
decoding is the tree of the root alone. Parents come before children, so any leading rows of a
tree are a tree again.

Shapes:
    N: rows of the tree, root included.    V: vocabulary.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count

import mlx.core as mx
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Topology:
    r"""Who follows whom.

    Example:
        `Topology((-1, 0, 0, 1))` is a root with two children, rows 1 and 2; row 3 follows row 1::

            0 -- 1 -- 3        depth     (0, 1, 1, 2)
              \- 2            children  ((1, 2), (3,), (), ())
                               ranks     (0, 0, 1, 0)

    Attributes:
        parents: [N] row that row i follows; `parents[0] == -1`, and `0 <= parents[i] < i`.

    Raises:
        ValueError: If `parents` breaks these rules.
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the rules above."""
        if not self.parents or self.parents[0] != -1:
            raise ValueError(f"Row 0 must be the root, with parent -1; got {self.parents}.")
        for row, parent in enumerate(self.parents[1:], start=1):
            if not 0 <= parent < row:
                raise ValueError(
                    f"The parent of row {row} must be one of rows 0 to {row - 1}; got {parent}."
                )

    @classmethod
    def chain(cls, num_drafts: int) -> Topology:
        """Return a root followed by `num_drafts` rows, one after the other."""
        if num_drafts < 0:
            raise ValueError(f"The number of drafts must be 0 or more; got {num_drafts}.")
        return _chain(num_drafts)

    @classmethod
    def from_paths(cls, paths: Iterable[Iterable[int]]) -> Topology:
        """Return the tree that holds every path from the root, written as sibling ranks.

        `(0, 1)` is the second child of the root's first child. Rows are ordered by depth, then
        by path: `[(0,), (1,), (0, 0)]` gives parents `(-1, 0, 0, 1)`.

        Raises:
            ValueError: If a path occurs without its parent or without its elder siblings.
        """
        ordered = sorted({tuple(path) for path in paths} - {()}, key=lambda p: (len(p), p))
        rows: dict[tuple[int, ...], int] = {(): 0}
        parents = [-1]
        for path in ordered:
            *above, rank = path
            elder = (*above, rank - 1)
            if tuple(above) not in rows or (rank != 0 and elder not in rows):
                raise ValueError(
                    f"Path {path} needs its parent and all elder siblings among the paths."
                )
            rows[path] = len(parents)
            parents.append(rows[tuple(above)])
        return cls(tuple(parents))

    def __len__(self) -> int:
        """Return N."""
        return len(self.parents)

    def head(self, num_rows: int) -> Topology:
        """Return the tree of the first `num_rows` rows (all of them, if there are fewer)."""
        if num_rows >= len(self):
            return self
        return _chain(num_rows - 1) if self.is_chain else Topology(self.parents[:num_rows])

    @cached_property
    def is_chain(self) -> bool:
        """Whether each row follows the one before it (the root alone is a chain)."""
        return self.parents == tuple(range(-1, len(self) - 1))

    @cached_property
    def depth(self) -> tuple[int, ...]:
        """[N] steps from the root to row i: its position after the root's."""
        depth = [0]
        for parent in self.parents[1:]:
            depth.append(depth[parent] + 1)
        return tuple(depth)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """[N] rows that follow row i, in ascending order: the order in which they are tried."""
        children: list[list[int]] = [[] for _ in self.parents]
        for row, parent in enumerate(self.parents[1:], start=1):
            children[parent].append(row)
        return tuple(map(tuple, children))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """[N] place of row i among its siblings, from 0; the root's is 0."""
        return (0, *(self.children[p].index(row) for row, p in enumerate(self.parents) if row))

    @cached_property
    def families(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """Entry r: the rows with more than r children, and the child of rank r of each."""
        width = max(map(len, self.children))
        at_least = [
            [row for row, c in enumerate(self.children) if len(c) > r] for r in range(width)
        ]
        return tuple(
            (tuple(rows), tuple(self.children[row][rank] for row in rows))
            for rank, rows in enumerate(at_least)
        )

    @cached_property
    def elders(self) -> npt.NDArray[np.bool_]:
        """[N, N] bool; row i is True at its elder siblings."""
        parents = np.array(self.parents)
        return np.tril(parents[:, None] == parents, -1)

    @cached_property
    def mask(self) -> npt.NDArray[np.bool_]:
        """[N, N] bool; row i is True at itself and at its ancestors: what row i attends to."""
        mask = np.eye(len(self), dtype=np.bool_)
        for row, parent in enumerate(self.parents[1:], start=1):
            mask[row] |= mask[parent]
        mask.flags.writeable = False
        return mask


@lru_cache
def _chain(num_drafts: int) -> Topology:
    """Return the same chain each time, with what was computed of it."""
    return Topology(tuple(range(-1, num_drafts)))


@dataclass(frozen=True, eq=False)
class DraftTree:
    """Drafts for one round.

    Attributes:
        topology: Shape of the tree, N rows.
        tokens: [N] int32 on the device; row 0 is the root, row i a draft for what follows
            `parents[i]`. Ids lie in the target's vocabulary.
        probs: [N, V] float32 or None; row i is the drafter's law q from which row i's children
            were drawn one after the other, without replacement. Rows without children are not
            read. None: the drafts are deterministic (their q is a point mass).
        lookahead: A hint that the drafter's next tree will be the root alone as well, whatever
            this round brings, so that the next pass may start before the host knows its token.
        parked: Whether this is the root alone because drafting does not pay at present.

    Raises:
        ValueError: If the number of tokens or of laws is not N.
    """

    topology: Topology
    tokens: mx.array
    probs: mx.array | None = None
    lookahead: bool = False
    parked: bool = False

    def __post_init__(self) -> None:
        """Check shapes; no array is evaluated."""
        num_rows = len(self.topology)
        if self.tokens.shape != (num_rows,):
            raise ValueError(
                f"A tree of {num_rows} rows needs tokens of shape ({num_rows},); "
                f"got {self.tokens.shape}."
            )
        if self.probs is not None and (self.probs.ndim != 2 or self.probs.shape[0] != num_rows):
            raise ValueError(
                f"A tree of {num_rows} rows needs probs of shape ({num_rows}, V); "
                f"got {self.probs.shape}."
            )

    def __len__(self) -> int:
        """Return N."""
        return len(self.topology)

    def head(self, num_rows: int) -> DraftTree:
        """Return the tree of the first `num_rows` rows (itself, if it has no more)."""
        if num_rows >= len(self):
            return self
        probs = None if self.probs is None else self.probs[:num_rows]
        topology = self.topology.head(num_rows)
        return DraftTree(topology, self.tokens[:num_rows], probs, self.lookahead, self.parked)


@dataclass(frozen=True)
class Node:
    """A draft that a tree might hold.

    Attributes:
        parent: Its parent's row.
        path: Tokens from the first draft down to this one.
        prob: Product of the probabilities along the path.
        kind: As `best_first` was told.
    """

    parent: int
    path: tuple[int, ...]
    prob: float
    kind: Hashable


def best_first(
    expand: Callable[[tuple[int, ...]], Iterable[tuple[int, float, Hashable]]], limit: int
) -> tuple[Node, ...]:
    """Return the most likely drafts, most likely first: rows 1, 2, ... of a tree.

    A draft is never likelier than its parent, so parents come first, and the leading m rows are the
    tree of m drafts of which most are expected to be accepted.

    Example:
        With slots that say a (0.6) or b (0.4), then c (0.9) or d (0.1), whatever came before, the
        four best are a (0.6), ac (0.54), b (0.4) and bc (0.36).

    Args:
        expand: A path -> token, probability that it is accepted if the path is, and kind of each
            draft that may follow; tokens differ.
        limit: Most drafts.

    Source:
        Best-first expansion as in Li et al. 2024, EAGLE-2, section 4; the sum of log q orders
        drafts as their product does.
    """
    nodes: list[Node] = []
    found: list[tuple[float, int, Node]] = []
    order = count()  # among equals, the one found first

    def open_(row: int, path: tuple[int, ...], prob: float) -> None:
        for token, share, kind in expand(path):
            node = Node(row, (*path, token), prob * min(share, 1.0), kind)
            heapq.heappush(found, (-node.prob, next(order), node))

    open_(0, (), 1.0)
    while found and len(nodes) < limit:
        node = heapq.heappop(found)[2]
        nodes.append(node)
        open_(len(nodes), node.path, node.prob)
    return tuple(nodes)
