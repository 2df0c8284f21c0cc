"""Does a batched pass say what single passes say, on this very model?

A few rows decide it: one by one, as a chain, as a tree whose true path lies between wrong
siblings, and the row after committing that path. A wrong position, mask or cache row changes the
logits by a sizeable share of their range; rounding does not.

Shapes:
    V: vocabulary.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from flash_mlx.prompt import Prompt
from flash_mlx.targets.adapter import MlxVlmTarget
from flash_mlx.targets.cache import SequenceCache
from flash_mlx.tree import DraftTree, Topology

PROMPT_ROWS = 4
# Root 0, wrong child 1, right child 2, a wrong child of each, right child 5 of row 2.
TREE = Topology((-1, 0, 0, 1, 2, 2))
PATH = (0, 2, 5)
# Largest difference allowed, as a share of the largest logit. On a CPU, float32 passes differ by
# 1e-6, 16-bit ones not at all, and planted mistakes make 0.2 or more. The room is for GPUs, whose
# products round differently for one row and for several (TF32, 16-bit accumulation).
TOLERANCE = {mx.float32: 0.02}
TOLERANCE_16_BIT = 0.1


def check_target(target: MlxVlmTarget) -> bool:
    """Compare passes of a few tokens.

    Returns:
        Whether tree passes can be trusted.

    Raises:
        ValueError: If not even chain passes can.
    """
    prompt, right, wrong = _tokens(target.vocab_size)
    cache = target.make_cache()
    target.prefill(prompt, cache)
    single = []
    for token in right:
        single.append(_verify(target, cache, Topology.chain(0), [token]))
        cache.commit((0,))
    expected = mx.concatenate(single)  # [4, V]

    cache = target.make_cache()
    target.prefill(prompt, cache)
    chain = _verify(target, cache, Topology.chain(3), right)
    if not _close(chain, expected):
        raise ValueError(
            f"A pass over several tokens must say what passes over one say; this "
            f"{target.family.model_type} model differs by "
            f"{_difference(chain, expected):.2g} of its largest logit. It cannot be a target with "
            "the installed mlx-vlm."
        )
    try:
        return _tree_agrees(target, cache, right, wrong, expected)
    except (TypeError, ValueError):  # a hook that this version of the model does not take
        return False


def check_joined(target: MlxVlmTarget) -> bool:
    """Return whether a joined pass of two texts can be trusted: it says what their own passes say.

    One of the texts is longer than the other, and has a tree; the other has a chain.
    """
    if not target.joins:
        return False
    prompt, right, wrong = _tokens(target.vocab_size)
    prompts = prompt, Prompt((*wrong, *prompt.tokens))
    trees = [
        DraftTree(TREE, mx.array([*right, *wrong[:2]], dtype=mx.int32)),
        DraftTree(Topology.chain(2), mx.array(wrong, dtype=mx.int32)),
    ]
    caches = [target.make_cache() for _ in prompts]
    for each, cache in zip(prompts, caches, strict=True):
        target.prefill(each, cache)
    alone = [target.verify(tree, cache) for tree, cache in zip(trees, caches, strict=True)]
    mx.eval([out.logits for out in alone])  # before the joined rows take the place of theirs
    together = target.verify_together(trees, caches)
    return all(_close(a.logits, b.logits) for a, b in zip(together, alone, strict=True))


def _tree_agrees(
    target: MlxVlmTarget,
    cache: SequenceCache,
    right: list[int],
    wrong: list[int],
    expected: mx.array,
) -> bool:
    tokens = [right[0], wrong[0], right[1], wrong[1], wrong[2], right[2]]
    rows = _verify(target, cache, TREE, tokens)[mx.array(PATH)]
    cache.commit(PATH)
    after = _verify(target, cache, Topology.chain(0), right[3:])
    return _close(mx.concatenate([rows, after]), expected)


def _tokens(vocab_size: int) -> tuple[Prompt, list[int], list[int]]:
    """Return a prompt, four ids and three others, spread over the vocabulary."""
    ids = [(1 + i * 7919) % vocab_size for i in range(PROMPT_ROWS + 7)]
    return Prompt(tuple(ids[:PROMPT_ROWS])), ids[PROMPT_ROWS:-3], ids[-3:]


def _verify(
    target: MlxVlmTarget, cache: SequenceCache, topology: Topology, tokens: list[int]
) -> mx.array:
    return target.verify(DraftTree(topology, mx.array(tokens, dtype=mx.int32)), cache).logits


def _close(logits: mx.array, expected: mx.array) -> bool:
    # A comparison with NaN is false, so a model that overflows does not pass.
    return _difference(logits, expected) <= TOLERANCE.get(logits.dtype, TOLERANCE_16_BIT)


def _difference(logits: mx.array, expected: mx.array) -> float:
    """Return the largest difference as a share of the largest logit."""
    expected = expected.astype(mx.float32)
    difference = mx.abs(logits.astype(mx.float32) - expected).max()
    share = np.array(difference / mx.abs(expected).max())
    return float(share)
