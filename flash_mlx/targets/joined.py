"""One pass over the trees of several texts.

The rows of all trees stand side by side as one sequence of R rows, so each weight is read once for
all of them. In attention the rows part again: each tree reads its own text's keys and values, with
its own mask, as it does alone. Nothing is padded and no caches are merged.

A family's attention rotates its rows by `hooks`, each by its own position; gives its keys and
values to a cache, which hands each text its own; and calls `scaled_dot_product_attention` by the
name that its module imported, which for the time of the pass leads here.

Shapes:
    B: texts.    N: rows of a text's tree.    R: rows of all trees.    L: rows committed of a text.
    H: heads.    E: head size.    D: hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flash_mlx.targets.cache import SequenceCache
from flash_mlx.targets.tree_kernel import NAME, attending_modules
from flash_mlx.tree import DraftTree


class Parts(list[mx.array]):
    """Keys or values of several texts, [1, H, L + N, E] each."""


class JoinedLayer:
    """The caches of one decoder layer, of several texts, as if they were one.

    Attributes:
        offset: Where attention would put its first row, if no positions were given.
    """

    offset = 0

    def __init__(self, layers: Sequence[Any], stops: Sequence[int]) -> None:
        """Join caches.

        Args:
            layers: [B] mlx-vlm's caches.
            stops: [B] the row after each tree's last.
        """
        self._layers, self._spans = layers, [*pairwise((0, *stops))]

    def make_mask(self, *_rows: object, **_options: object) -> None:
        """Return none: each text has its own."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Parts, Parts]:
        """Hand each text its rows of keys and values [1, H, R, E]; return all that it has."""
        found = [
            layer.update_and_fetch(keys[..., start:stop, :], values[..., start:stop, :])
            for layer, (start, stop) in zip(self._layers, self._spans, strict=True)
        ]
        return Parts(each for each, _ in found), Parts(each for _, each in found)


def join_layers(trees: Sequence[DraftTree], caches: Sequence[SequenceCache]) -> list[JoinedLayer]:
    """Return the joined cache of each decoder layer."""
    stops = [sum(len(tree) for tree in trees[: place + 1]) for place in range(len(trees))]
    return [JoinedLayer(of_one, stops) for of_one in zip(*(c.layers for c in caches), strict=True)]


class JoinedAttention:
    """Lets the attention of one model read several texts."""

    def __init__(self, stack: nn.Module) -> None:
        """Find the modules that define the stack's layers."""
        self._modules = attending_modules(stack)

    @contextmanager
    def active(self, trees: Sequence[DraftTree], lengths: Sequence[int]) -> Iterator[None]:
        """Let attention inside be each text's own.

        Args:
            trees: [B].
            lengths: [B] of L.
        """
        masks = [_mask(tree, length) for tree, length in zip(trees, lengths, strict=True)]
        before = [vars(module)[NAME] for module in self._modules]
        try:
            for module, original in zip(self._modules, before, strict=True):
                vars(module)[NAME] = _apart(original, [len(tree) for tree in trees], masks)
            yield
        finally:
            for module, original in zip(self._modules, before, strict=True):
                vars(module)[NAME] = original


def _mask(tree: DraftTree, length: int) -> mx.array | str | None:
    """Return what attention takes for a tree after L rows: a mask [1, 1, N, L + N] or its name."""
    if len(tree) == 1:
        return None
    if tree.topology.is_chain:
        return "causal"
    before = mx.ones((len(tree), length), mx.bool_)
    return mx.concatenate([before, mx.array(tree.topology.mask)], axis=1)[None, None]


def _apart(
    original: Callable[..., mx.array], rows: Sequence[int], masks: Sequence[mx.array | str | None]
) -> Callable[..., mx.array]:
    """Return attention of queries [1, H, R, E], text by text."""
    stops = [sum(rows[: place + 1]) for place in range(len(rows))]

    def attend(
        queries: mx.array, keys: Any, values: Any, cache: Any, *, mask: Any, **more: Any
    ) -> mx.array:
        if not isinstance(keys, Parts):
            return original(queries, keys, values, cache, mask=mask, **more)
        parts = zip(pairwise((0, *stops)), keys, values, masks, strict=True)
        found = [
            original(queries[..., start:stop, :], k, v, cache, mask=own, **more)
            for (start, stop), k, v, own in parts
        ]
        return mx.concatenate(found, axis=2)

    return attend
