"""A cache of any length whose rows nobody read: for measuring passes without reading a prompt."""

from __future__ import annotations

import mlx.core as mx

from flash_mlx.decode import ROOT_ALONE
from flash_mlx.targets.adapter import MlxVlmTarget
from flash_mlx.targets.cache import SequenceCache
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
    for layer in cache.layers:  # [1, key-value heads, capacity, head size]
        for_keys, for_values = (
            mx.zeros((*part.shape[:2], length - 1, part.shape[3]), part.dtype)
            for part in (layer.keys, layer.values)
        )
        layer.update_and_fetch(for_keys, for_values)
        mx.eval(layer.keys, layer.values)
    cache.commit(range(length - 1))
    return cache
