"""One small call of each kernel for each type and template, for all tests that go through them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from flash_mlx.kernels.accept_tree import ACCEPT_TREE
from flash_mlx.kernels.dispatch import Kernel
from flash_mlx.kernels.latent_pool import LATENT_POOL
from flash_mlx.kernels.lmhead_topk import LMHEAD_TOPK
from flash_mlx.kernels.slot_attention import SLOT_ATTENTION
from flash_mlx.kernels.tree_attention import TREE_ATTENTION, ancestor_bits
from flash_mlx.kernels.verify_qmm import VERIFY_QMM
from flash_mlx.tree import Topology

FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(frozen=True)
class Case:
    """A call.

    Attributes:
        name: Of the case.
        kernel: What is called.
        make: Returns the arguments.
    """

    name: str
    kernel: Kernel
    make: Callable[[], tuple[Any, ...]]


def normal(
    *shape: int, dtype: mx.Dtype = mx.float32, seed: int = 0, scale: float = 1.0
) -> mx.array:
    return (mx.random.normal(shape, key=mx.random.key(seed)) * scale).astype(dtype)


def pool_arguments(
    num_latents: int, num_rows: int, size: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    # Scores of about 1: else one row of the image takes all.
    queries = normal(num_latents, size, dtype=dtype, seed=1, scale=size**-0.5)
    return queries, normal(num_rows, size, dtype=dtype, seed=2)


def short(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def quantized(
    rows: int, outputs: int, size: int, group: int, bits: int, dtype: mx.Dtype
) -> tuple[Any, ...]:
    weight = normal(outputs, size, dtype=dtype, seed=3, scale=size**-0.5)
    return normal(rows, size, dtype=dtype, seed=4), *mx.quantize(weight, group, bits), group, bits


POOLS = [
    Case(
        f"latent_pool-{m}x{n}x{d}-{short(dtype)}",
        LATENT_POOL,
        lambda m=m, n=n, d=d, dtype=dtype: pool_arguments(m, n, d, dtype),
    )
    for m, n, d in ((8, 40, 64), (5, 33, 72))
    for dtype in FLOATS
]

PRODUCTS = [
    Case(
        f"verify_qmm-{m}x{n}x{k}-g{group}-b{bits}-{short(dtype)}",
        VERIFY_QMM,
        lambda m=m, n=n, k=k, group=group, bits=bits, dtype=dtype: quantized(
            m, n, k, group, bits, dtype
        ),
    )
    for m, n, k, group, bits in (
        (2, 64, 256, 64, 4),
        (8, 100, 384, 32, 8),
        (16, 37, 640, 128, 4),
        (9, 32, 128, 128, 8),
    )
    for dtype in FLOATS
]

HEADS = [
    Case(
        f"lmhead_topk-{m}x{v}x{k}-g{group}-b{bits}-top{keep}-{short(dtype)}",
        LMHEAD_TOPK,
        lambda m=m, v=v, k=k, group=group, bits=bits, keep=keep, dtype=dtype: (
            *quantized(m, v, k, group, bits, dtype),
            keep,
        ),
    )
    for m, v, k, group, bits, keep in ((1, 300, 128, 64, 4, 1), (11, 600, 256, 32, 8, 10))
    for dtype in FLOATS
]


def tied_head(apart: int, copies: int, keep: int) -> tuple[Any, ...]:
    """Every token several times, so that all logits are tied."""
    x, *head = quantized(2, apart, 128, 64, 4, mx.float32)
    return x, *(mx.concatenate([part] * copies) for part in head[:3]), *head[3:], keep


# Equal tokens are one lane's of one tile (64), another lane's (72), those of other tiles (192), or
# so far apart that one lane of the second kernel meets both (8 tiles of 32 kept tokens).
HEADS += [
    Case(
        f"lmhead_topk-ties{apart}",
        LMHEAD_TOPK,
        lambda apart=apart, copies=copies, keep=keep: tied_head(apart, copies, keep),
    )
    for apart, copies, keep in ((64, 3, 7), (72, 3, 7), (192, 3, 7), (2048, 2, 32))
]


def tree_arguments(
    heads: int, shared: int, size: int, length: int, rows: int, dtype: mx.Dtype
) -> tuple[Any, ...]:
    """Keys and values are views of a cache in which NaN stands where nothing may be read."""
    rng = np.random.default_rng(rows)
    parents = (-1, *(int(rng.integers(max(0, row - 5), row)) for row in range(1, rows)))

    def view(seed: int) -> mx.array:
        valid = normal(shared, length, size, dtype=dtype, seed=seed)
        return mx.pad(valid, [(0, 0), (0, 19), (0, 0)], constant_values=mx.nan)[:, :length]

    queries = normal(heads, rows, size, dtype=dtype, seed=5)
    mx.eval(keys := view(6), values := view(7))
    return queries, keys, values, ancestor_bits(Topology(parents).mask), size**-0.5


TREES = [
    Case(
        f"tree_attention-{h}h{shared}x{d}-{length}keys-{m}rows-{short(dtype)}",
        TREE_ATTENTION,
        lambda h=h, shared=shared, d=d, length=length, m=m, dtype=dtype: tree_arguments(
            h, shared, d, length, m, dtype
        ),
    )
    for h, shared, d, length, m in (
        (4, 2, 64, 77, 5),
        (7, 1, 80, 300, 9),
        (2, 2, 96, 70, 64),
        (8, 1, 128, 33, 1),
    )
    for dtype in FLOATS
]


def slot_arguments(
    rows: int, slots: int, heads: int, size: int, start: int, dtype: mx.Dtype
) -> tuple[Any, ...]:
    joined = normal(rows, 3, heads, size, dtype=dtype, seed=8)

    def cache(seed: int) -> mx.array:
        valid = normal(1, heads, start, size, dtype=dtype, seed=seed)
        return mx.pad(valid, [(0, 0), (0, 0), (0, 7), (0, 0)], constant_values=mx.nan)

    return joined, cache(9), cache(10), start, slots, 10000.0


SLOTS = [
    Case(
        f"slot_attention-{rows}rows-{slots}slots-{heads}h{size}-at{start}-{short(dtype)}",
        SLOT_ATTENTION,
        lambda rows=rows, slots=slots, heads=heads, size=size, start=start, dtype=dtype: (
            slot_arguments(rows, slots, heads, size, start, dtype)
        ),
    )
    for rows, slots, heads, size, start in ((4, 4, 2, 64, 1), (7, 3, 1, 80, 50), (12, 8, 2, 128, 9))
    for dtype in FLOATS
]


def walk_arguments(rows: int, greedy: bool, seed: int = 0) -> tuple[Any, ...]:
    """A tree in which about every second row holds, and children of one row differ."""
    rng = np.random.default_rng(100 * rows + seed)
    parents = np.array([-1, *(rng.integers(max(0, i - 4), i) for i in range(1, rows))])
    tokens = np.array([10 * (i - parents[i]) for i in range(rows)])  # siblings differ
    choice = rng.integers(100, 200, rows)
    holds = rng.integers(0, 2, rows)
    for row in np.flatnonzero(holds[1:]) + 1:
        choice[parents[row]] = tokens[row]
    arrays = [mx.array(x.astype(np.int32)) for x in (parents, tokens, choice, holds)]
    return (*arrays[:3], None if greedy else arrays[3])


WALKS = [
    Case(
        f"accept_tree-{rows}rows-{'greedy' if greedy else 'sampled'}",
        ACCEPT_TREE,
        lambda rows=rows, greedy=greedy: walk_arguments(rows, greedy),
    )
    for rows in (1, 5, 9, 64)
    for greedy in (True, False)
]

CASES = [*POOLS, *PRODUCTS, *HEADS, *TREES, *SLOTS, *WALKS]
