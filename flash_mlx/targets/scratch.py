"""A cache of any length whose rows nobody read: for measuring passes without reading a prompt."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from flash_mlx.decode import ROOT_ALONE
from flash_mlx.targets.adapter import MlxVlmTarget
from flash_mlx.targets.cache import SequenceCache, arrays
from flash_mlx.tree import DraftTree, Topology


def scratch_cache(target: MlxVlmTarget, length: int) -> SequenceCache:
    """Return a cache of `length` committed rows of zeros; passes over it take their usual time.

    Args:
        target: Whose cache it is.
        length: At least 2.
    """
    cache = target.make_cache()
    mx.eval(target.verify(DraftTree(ROOT_ALONE, mx.zeros((1,), mx.int32)), cache).logits)
    cache.commit((0,))
    cache.open(Topology.chain(length - 2))
    for layer in cache.layers:
        layer.update_and_fetch(
            *(_rows(part, layer, length - 1) for part in (layer.keys, layer.values))
        )
        mx.eval(arrays(layer))
    cache.commit(range(length - 1))
    return cache


def _rows(part: Any, layer: Any, number: int) -> mx.array:
    """Return rows of zeros, [1, key-value heads, number, head size], for keys or values."""
    if isinstance(part, mx.array):
        (_, heads, _, size), dtype = part.shape, part.dtype
    else:
        scales = part[1]
        (_, heads, _, groups), dtype = scales.shape, scales.dtype
        size = groups * layer.group_size
    return mx.zeros((1, heads, number, size), dtype)
