"""Whether what a drafter returned is a tree of tokens at all.

A drafter is a guess, and so may be broken: weights that overflow give laws of NaN, a wrong
vocabulary gives ids that the target does not have. No draft of such a tree may be read, and no law
of it believed, or the text would suffer.

Shapes:
    N: rows of the tree.    V: vocabulary.    P: rows with children.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import mlx.core as mx

from flash_mlx.tree import DraftTree

FAULT = (
    "A drafter must return ids of the target's vocabulary and laws that sum to 1; this one did "
    "not, so the text goes on without it. Check its weights."
)
TOLERANCE = 1e-2  # of a law's sum: 16-bit laws are that far off, broken ones much farther


def guard(tree: DraftTree, vocab_size: int) -> tuple[DraftTree, mx.array | None]:
    """Return a tree that can be read, and whether it must not be believed; lazy.

    Args:
        tree: N rows, as drafted.
        vocab_size: V.

    Returns:
        The tree with 0 for each id outside of the vocabulary; [] bool, true if there was one, or if
        the law of a row with children is no law. A root alone holds nothing to doubt: None.
    """
    if len(tree) == 1:
        return tree, None
    stray = (tree.tokens < 0) | (tree.tokens >= vocab_size)
    fault = stray.any()
    if tree.probs is not None:
        inner = [row for row, children in enumerate(tree.topology.children) if children]
        chain = tree.topology.is_chain
        laws = tree.probs[:-1] if chain else tree.probs[mx.array(inner, dtype=mx.int32)]
        # A comparison with NaN is false.
        sound = mx.abs(laws.astype(mx.float32).sum(axis=-1) - 1) < TOLERANCE
        fault = fault | ~(sound & (laws.min(axis=-1) >= 0)).all()
    return replace(tree, tokens=mx.where(stray, 0, tree.tokens)), fault


def warn() -> None:
    """Say that a drafter is dropped."""
    warnings.warn(FAULT, RuntimeWarning, stacklevel=3)
