"""A target's passes, to be held against one another.

Shapes:
    N: rows of a tree.
"""

from collections.abc import Sequence
from itertools import cycle, islice

import mlx.core as mx
import numpy as np

from flash_mlx.decode import Output
from flash_mlx.prompt import Prompt
from flash_mlx.targets import MlxVlmTarget
from flash_mlx.targets.cache import SequenceCache
from flash_mlx.tree import DraftTree, Topology

TOLERANCE = 1e-4  # float32: rounding differs by about 1e-6, mistakes by tenths
TREE = Topology((-1, 0, 0, 1, 2, 2, 4, 4))


def random_tokens(target: MlxVlmTarget, count: int, seed: int = 0) -> list[int]:
    text = target.vocab_size - 16  # below the special tokens, one of which stands for images
    return np.random.default_rng(seed).integers(0, text, count).tolist()


def tree_of(topology: Topology, tokens: Sequence[int]) -> DraftTree:
    return DraftTree(topology, mx.array(tokens, dtype=mx.int32))


def mixed_trees(target: MlxVlmTarget, count: int) -> list[DraftTree]:
    """Return trees of several shapes, such as several texts may have in one pass."""
    shapes = islice(cycle((TREE, Topology.chain(0), Topology.chain(4))), count)
    drafts = [(shape, random_tokens(target, len(shape), seed)) for seed, shape in enumerate(shapes)]
    return [tree_of(shape, tokens) for shape, tokens in drafts]


def after(target: MlxVlmTarget, prompt: Prompt) -> SequenceCache:
    cache = target.make_cache()
    target.prefill(prompt, cache)
    return cache


def one_by_one(target: MlxVlmTarget, prompt: Prompt, tokens: Sequence[int]) -> Output:
    cache = after(target, prompt)
    outputs = []
    for token in tokens:
        outputs.append(target.verify(tree_of(Topology.chain(0), [token]), cache))
        cache.commit((0,))
    assert cache.length == len(prompt) + len(tokens)
    return Output(
        mx.concatenate([out.logits for out in outputs]),
        mx.concatenate([out.hidden for out in outputs]),
    )


def assert_same(actual: Output, expected: Output) -> None:
    for name in ("logits", "hidden"):
        a, b = getattr(actual, name), getattr(expected, name)
        assert a.shape == b.shape
        assert float(mx.abs(a - b).max()) < TOLERANCE, name


def paths(topology: Topology) -> list[tuple[int, ...]]:
    """Every path that a round may accept."""
    found: list[tuple[int, ...]] = []
    for row, parent in enumerate(topology.parents):
        above = next((path for path in found if path[-1] == parent), ())
        found.append((*above, row))
    return found
