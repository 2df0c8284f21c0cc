"""What a tree pass needs of an mlx-vlm model that a causal pass does not.

* A mask: every family asks its cache for one, so the caches answer with the tree's.
* A position for each row: M-RoPE families take `position_ids`. The others rotate all rows by one
  offset, so their RoPE modules fold rows into the batch axis, where an offset each is allowed.
* In layers that see a window of the last rows only, what is in the window: rows of a tree stand
  side by side, so it goes by their positions.

All change the class of *instances* and only while a context manager is open: weights, parameter
names and quantisation are untouched, and the model is left as it was. Not for use from several
threads at once.

Shapes:
    N: rows of the tree.    L: rows committed before it.    H: heads.    E: head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class TreeHooks:
    """The hooks of one model."""

    def __init__(self, decoder: nn.Module, cache_class: type[Any]) -> None:
        """Prepare hooks.

        Args:
            decoder: The stack of decoder layers.
            cache_class: mlx-vlm's class of its layer caches.
        """
        self._mask: mx.array | None = None
        self._offsets: mx.array | None = None
        self._ropes = [module for module in decoder.modules() if type(module) is nn.RoPE]
        self._hooked_rope = _subclass(nn.RoPE, "__call__", self._rotate)
        self._hooked_cache = _subclass(cache_class, "make_mask", self._make_mask)

    @contextmanager
    def active(self, caches: Sequence[Any], mask: mx.array, offsets: mx.array) -> Iterator[None]:
        """Let passes inside use this mask and these positions.

        Args:
            caches: The sequence's layer caches.
            mask: [1, 1, N, L + N] bool; True where row i attends.
            offsets: [N] int32; position of row i.
        """
        hooked = [(cache, self._hooked_cache) for cache in caches]
        hooked += [(rope, self._hooked_rope) for rope in self._ropes]
        plain = [(instance, instance.__class__) for instance, _ in hooked]
        self._mask, self._offsets = mask, offsets
        try:
            for instance, subclass in hooked:
                instance.__class__ = subclass
            yield
        finally:
            for instance, original in plain:
                instance.__class__ = original
            self._mask = self._offsets = None

    def _make_mask(
        self, _cache: object, _rows: int, window_size: int | None = None, **_options: object
    ) -> mx.array | None:
        """Return the mask; with a window, without what lies before it."""
        if window_size is None or self._mask is None or self._offsets is None:
            return self._mask
        length = self._mask.shape[-1] - self._mask.shape[-2]
        columns = mx.concatenate([mx.arange(length), self._offsets])
        return self._mask & (self._offsets[:, None] - columns < window_size)

    def _rotate(self, rope: Any, x: mx.array, **_cache_offset: object) -> mx.array:
        """Rotate x [1, H, N, E], each row by its own position instead of the cache's."""
        _, heads, rows, size = x.shape
        by_row = x.transpose(0, 2, 1, 3).reshape(rows, heads, 1, size)
        offsets: Any = self._offsets  # nn.RoPE declares an int; mx.fast.rope takes one a row too
        turned: mx.array = nn.RoPE.__call__(rope, by_row, offset=offsets)
        return turned.reshape(1, rows, heads, size).transpose(0, 2, 1, 3)


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[mx.array]]:
    """Collect what a module returns while the context manager is open."""
    original = module.__class__
    outputs: list[mx.array] = []

    def call(self: Any, *args: object, **kwargs: object) -> mx.array:
        outputs.append(original.__call__(self, *args, **kwargs))
        return outputs[-1]

    module.__class__ = _subclass(original, "__call__", call)
    try:
        yield outputs
    finally:
        module.__class__ = original


def _subclass(base: type[Any], method: str, replacement: Callable[..., Any]) -> type[Any]:
    """Derive a class whose `method` calls `replacement(self, ...)`."""

    def call(self: object, *args: object, **kwargs: object) -> object:
        return replacement(self, *args, **kwargs)

    return type(f"Hooked{base.__name__}", (base,), {method: call, "__module__": __name__})
