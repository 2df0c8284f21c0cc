"""The keys and values of one sequence in an mlx-vlm model.

Rows of the tree verified last are provisional: they stand behind the committed rows and stay only
if committed. A chain's accepted rows are its first ones, so committing drops the tail; those of a
tree are moved together first.

Shapes:
    N: rows of the tree.    A: rows committed of it.
    A layer's keys and values are [1, key-value heads, capacity, head size]; or each is three
    arrays, packed values, scales and biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx

from flash_mlx.tree import Topology


class SequenceCache:
    """A cache that knows which of its rows are committed.

    Attributes:
        layers: mlx-vlm's cache of each decoder layer.
        rope_delta: Under M-RoPE, the position of the next row minus its index: an image takes
            fewer positions than rows. 0 elsewhere.
    """

    def __init__(self, layers: list[Any]) -> None:
        """Wrap empty layer caches."""
        self.layers = layers
        self.rope_delta = 0
        self._length = 0
        self._provisional: Topology | None = None

    @property
    def length(self) -> int:
        """Rows committed."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, room for further rows included."""
        return sum(each.nbytes for layer in self.layers if layer.offset for each in arrays(layer))

    def rewind(self, length: int) -> None:
        """Forget all rows but the first `length`, for a text that goes on differently there.

        The rope delta stays, so under M-RoPE no image may be forgotten, unless all rows are.

        Raises:
            ValueError: If there are not that many.
        """
        if not 0 <= length <= self._length:
            raise ValueError(
                f"A cache can go back to at most its {self._length} rows; got {length}."
            )
        self._length, self._provisional = length, None
        self._drop_uncommitted()

    def open(self, tree: Topology) -> None:
        """Drop provisional rows, if any; the next N rows written are those of `tree`."""
        if self._provisional is not None:
            self._drop_uncommitted()
        self._provisional = tree

    def commit(self, rows: Sequence[int]) -> None:
        """Keep these rows of the tree verified last, in this order, and drop the others.

        Args:
            rows: [A] ascending path from the root; `rows[0] == 0`.

        Raises:
            ValueError: If no tree is open or `rows` is not a path from its root.
        """
        tree = self._provisional
        if tree is None:
            raise ValueError("Rows can be committed once after each verified tree; there is none.")
        if not _is_path(rows, tree):
            raise ValueError(
                f"Committed rows must be a path from the root of the tree verified last, with "
                f"parents {tree.parents}; got {tuple(rows)}."
            )
        if rows[-1] != len(rows) - 1:
            self._gather(rows)
        self._provisional = None
        self._length += len(rows)
        if len(rows) < len(tree):
            self._drop_uncommitted()

    def _gather(self, rows: Sequence[int]) -> None:
        """Move the keys and values of `rows` together, behind the committed ones."""
        first = next(place for place, row in enumerate(rows) if row != place)
        source = mx.array(tuple(rows[first:])) + self._length
        start, stop = self._length + first, self._length + len(rows)
        stored = [each for layer in self.layers for each in arrays(layer)]
        moved = [each[..., source, :] for each in stored]
        mx.eval(moved)  # MLX would copy all keys and values if it wrote to them while it reads
        for each, there in zip(stored, moved, strict=True):
            each[..., start:stop, :] = there

    def _drop_uncommitted(self) -> None:
        for layer in self.layers:
            layer.trim(layer.offset - self._length)


def arrays(layer: Any) -> list[mx.array]:
    """Return what a layer's cache holds: keys and values, or their packed values and scales.

    Each is [1, key-value heads, capacity, .].
    """
    parts = (layer.keys, layer.values)
    return [each for part in parts for each in (part if isinstance(part, tuple | list) else [part])]


def _is_path(rows: Sequence[int], tree: Topology) -> bool:
    if not rows or rows[0] != 0:
        return False
    return all(0 <= row < len(tree) and tree.parents[row] == above for above, row in pairwise(rows))
