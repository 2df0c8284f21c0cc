"""The attention of tree passes by `tree_attention`, in models that mlx-vlm defines.

A family's attention calls `scaled_dot_product_attention` by the name that its module imported. For
the time of a tree pass on Metal that name leads here. What is not the tree's own attention - other
shapes, sinks - goes on to mlx-vlm's function.

Shapes:
    N: rows of the tree.    L: rows committed before it.    H: heads.    E: head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flash_mlx.kernels import ancestor_bits, metal, tree_attention
from flash_mlx.kernels.tree_attention import MAX_ROWS
from flash_mlx.tree import Topology

NAME = "scaled_dot_product_attention"


class TreeAttention:
    """Lends one model's attention to the kernel."""

    def __init__(self, stack: nn.Module) -> None:
        """Find the modules that define the stack's layers."""
        self._modules = attending_modules(stack)

    @contextmanager
    def active(self, tree: Topology, length: int) -> Iterator[None]:
        """Let attention inside be the kernel's, where it has this tree's shape.

        Args:
            tree: N rows.
            length: L.
        """
        if not metal.available() or len(tree) > MAX_ROWS:
            yield
            return
        before = [vars(module)[NAME] for module in self._modules]
        bits = ancestor_bits(tree.mask)
        try:
            for module, original in zip(self._modules, before, strict=True):
                vars(module)[NAME] = partial(_attend, original, bits, length + len(tree))
            yield
        finally:
            for module, original in zip(self._modules, before, strict=True):
                vars(module)[NAME] = original


def attending_modules(stack: nn.Module) -> list[ModuleType]:
    """Return the Python modules of a stack's layers that know attention by its name."""
    names = {type(module).__module__ for module in stack.modules()}
    return [sys.modules[name] for name in names if NAME in vars(sys.modules[name])]


def _attend(
    original: Callable[..., mx.array],
    bits: mx.array,
    total: int,
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    *,
    scale: float,
    mask: mx.array | None,
    **more: Any,
) -> mx.array:
    """Return the attention [1, H, N, E] of queries [1, H, N, E] over keys [1, Hk, L + N, E]."""
    own = isinstance(mask, mx.array) and mask.shape[-2:] == (bits.size // 2, total)
    if own and not more and isinstance(keys, mx.array) and keys.shape[:3:2] == (1, total):
        return tree_attention(queries[0], keys[0], values[0], bits, scale)[None]
    return original(queries, keys, values, cache, scale=scale, mask=mask, **more)
