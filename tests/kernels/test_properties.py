"""What holds of kernels beyond single cases: random shapes, odd numbers, rows that do not mix."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cases import (
    CASES,
    FLOATS,
    Case,
    pool_arguments,
    quantized,
    slot_arguments,
    tree_arguments,
    walk_arguments,
)
from emulator import Emulator
from flash_mlx.kernels.accept_tree import ACCEPT_TREE
from flash_mlx.kernels.dispatch import Kernel, run
from flash_mlx.kernels.latent_pool import LATENT_POOL, latent_pool_kernel
from flash_mlx.kernels.lmhead_topk import LMHEAD_TOPK, lmhead_topk, most_likely
from flash_mlx.kernels.slot_attention import SLOT_ATTENTION
from flash_mlx.kernels.tree_attention import TREE_ATTENTION
from flash_mlx.kernels.trial import TOLERANCE, definition, worst_error
from flash_mlx.kernels.verify_qmm import VERIFY_QMM, verify_qmm_kernel
from test_kernels import check

# The same shapes each time, so that what was compiled is found again.
SWEEP = settings(
    max_examples=8,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
dtypes = st.sampled_from(FLOATS)


def meets(kernel: Kernel, *arguments: Any) -> None:
    check(Case(kernel.name, kernel, lambda: arguments))


@pytest.mark.slow
@SWEEP
@given(
    rows=st.integers(1, 16),
    outputs=st.integers(8, 90),
    chunks=st.integers(1, 5),
    group=st.sampled_from((32, 64, 128)),
    bits=st.sampled_from((4, 8)),
    dtype=dtypes,
)
@example(rows=1, outputs=33, chunks=3, group=32, bits=8, dtype=mx.bfloat16)
@example(rows=16, outputs=61, chunks=2, group=128, bits=4, dtype=mx.float16)
def test_products_of_any_shape(
    rows: int, outputs: int, chunks: int, group: int, bits: int, dtype: mx.Dtype, emulator: Emulator
) -> None:
    meets(VERIFY_QMM, *quantized(rows, outputs, 128 * chunks, group, bits, dtype))


@pytest.mark.slow
@SWEEP
@given(
    rows=st.integers(1, 16),
    tokens=st.integers(40, 900),
    keep=st.integers(1, 32),
    bits=st.sampled_from((4, 8)),
    dtype=dtypes,
)
def test_heads_of_any_size(
    rows: int, tokens: int, keep: int, bits: int, dtype: mx.Dtype, emulator: Emulator
) -> None:
    meets(LMHEAD_TOPK, *quantized(rows, tokens, 128, 64, bits, dtype), keep)


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 80, 96, 128])
@settings(SWEEP, max_examples=4)
@given(
    shared=st.integers(1, 3),
    group=st.integers(1, 8),
    rows=st.integers(1, 64),
    before=st.integers(0, 4096),
    dtype=dtypes,
)
@example(shared=1, group=8, rows=4, before=4096, dtype=mx.bfloat16)
@example(shared=2, group=1, rows=1, before=0, dtype=mx.float16)
def test_trees_of_any_size(
    shared: int,
    group: int,
    size: int,
    rows: int,
    before: int,
    dtype: mx.Dtype,
    emulator: Emulator,
) -> None:
    before = before if rows * group * shared < 64 else before % 200  # the emulator is no GPU
    meets(TREE_ATTENTION, *tree_arguments(shared * group, shared, size, before + rows, rows, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 80, 96, 128])
@settings(SWEEP, max_examples=4)
@given(
    heads=st.integers(1, 3),
    slots=st.integers(1, 8),
    earlier=st.integers(0, 8),
    start=st.integers(1, 4096),
    dtype=dtypes,
)
@example(heads=2, slots=8, earlier=0, start=4096, dtype=mx.bfloat16)
@example(heads=1, slots=1, earlier=8, start=1, dtype=mx.float16)
def test_slots_anywhere(
    heads: int,
    size: int,
    slots: int,
    earlier: int,
    start: int,
    dtype: mx.Dtype,
    emulator: Emulator,
) -> None:
    meets(SLOT_ATTENTION, *slot_arguments(slots + earlier, slots, heads, size, start, dtype))


@pytest.mark.slow
@SWEEP
@given(
    latents=st.integers(1, 64), rows=st.integers(8, 300), eighths=st.integers(8, 20), dtype=dtypes
)
def test_pools_of_any_size(
    latents: int, rows: int, eighths: int, dtype: mx.Dtype, emulator: Emulator
) -> None:
    meets(LATENT_POOL, *pool_arguments(latents, rows, 8 * eighths, dtype))


@settings(SWEEP, max_examples=60)
@given(rows=st.integers(1, 64), greedy=st.booleans(), seed=st.integers(0, 1000))
def test_walks_down_any_tree(rows: int, greedy: bool, seed: int, emulator: Emulator) -> None:
    meets(ACCEPT_TREE, *walk_arguments(rows, greedy, seed))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_does_not_depend_on_the_others(dtype: mx.Dtype, emulator: Emulator) -> None:
    x, *rest = quantized(16, 40, 384, 64, 4, dtype)
    (full,) = verify_qmm_kernel(x, *rest)
    for rows in (1, 2, 5, 8, 9):
        assert mx.array_equal(verify_qmm_kernel(x[:rows], *rest)[0], full[:rows])


def test_no_kernel_leaves_its_private_arrays(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Undefined behaviour of the C++ translation traps: indices, shifts, alignment."""
    trapping = Emulator(traps=True)
    monkeypatch.setattr(mx.fast, "metal_kernel", trapping.metal_kernel)
    for kernel in {case.kernel for case in CASES}:
        case = next(case for case in CASES if case.kernel is kernel)
        list(kernel.launch(*case.make()))
    assert len({launched.kernel.name for launched in trapping.launches}) == 9


def test_what_is_outside_the_guard_is_left_to_the_definition(forced: Emulator) -> None:
    """No row, one row too many: MLX's operations compute, and nothing is launched."""
    x, *head = quantized(17, 40, 128, 64, 4, mx.float32)
    calls: list[tuple[Kernel, tuple[Any, ...]]] = [
        (VERIFY_QMM, (x, *head)),
        (LMHEAD_TOPK, (x, *head, 3)),
        (ACCEPT_TREE, walk_arguments(65, greedy=False)),
        (LATENT_POOL, pool_arguments(65, 40, 64, mx.float32)),
    ]
    for kernel, arguments in calls:
        assert kernel.fits(*arguments) is not None
        found, expected = run(kernel, *arguments), kernel.ops(*arguments)
        assert all(mx.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    # A tree of more rows has no masks of 64 bits to begin with (`targets.tree_kernel` asks).
    tree = tree_arguments(4, 2, 64, 80, 5, mx.float32)
    for kernel, (first, *rest) in [*calls, (TREE_ATTENTION, tree)]:
        none = first[:, :0] if kernel is TREE_ATTENTION else first[:0]
        assert kernel.fits(none, *rest) is not None
    assert forced.launches == []


def spoil(array: mx.array, value: float) -> mx.array:
    """Put one odd number into an array."""
    return mx.where(mx.arange(array.size).reshape(array.shape) == array.size // 3, value, array)


ODD: dict[str, tuple[Kernel, Callable[[], tuple[Any, ...]], int]] = {
    "pool": (LATENT_POOL, lambda: pool_arguments(8, 40, 64, mx.float32), 1),
    "product": (VERIFY_QMM, lambda: quantized(8, 100, 384, 32, 8, mx.float32), 0),
    "tree": (TREE_ATTENTION, lambda: tree_arguments(4, 2, 64, 77, 5, mx.float32), 1),
    "tree values": (TREE_ATTENTION, lambda: tree_arguments(4, 2, 64, 77, 5, mx.float32), 2),
    "slots": (SLOT_ATTENTION, lambda: slot_arguments(7, 3, 1, 80, 50, mx.float32), 0),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ODD)
def test_odd_numbers_come_out_as_the_definition_says(
    name: str, value: float, emulator: Emulator
) -> None:
    kernel, make, which = ODD[name]
    arguments = list(make())
    arguments[which] = spoil(arguments[which], value)
    meets(kernel, *arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_odd_logits_spoil_their_row_only_and_name_a_token(value: float, emulator: Emulator) -> None:
    x, *rest = quantized(4, 300, 128, 64, 4, mx.float32)
    ids, logprobs = LMHEAD_TOPK.launch(spoil(x, value), *rest, 5)
    expected_ids, expected = definition(LMHEAD_TOPK.ops, (x, *rest, 5))
    whole = np.arange(4) != x.size // 3 // 128
    assert np.array_equal(np.array(ids)[whole], np.array(expected_ids)[whole])
    assert worst_error([logprobs[:1]], [expected[:1]])[0] < TOLERANCE[mx.float32]
    assert not np.isfinite(np.array(logprobs)[~whole]).all()
    assert (np.array(ids) >= 0).all()
    assert (np.array(ids) < 300).all()


def test_the_definition_of_the_most_likely_needs_no_sort_of_all() -> None:
    rng = np.random.default_rng(0)
    for vocab_size, keep in ((1, 1), (255, 7), (256, 32), (5000, 9)):
        logits = rng.integers(0, 40, (3, vocab_size)).astype(np.float32)  # with many ties
        ids, logprobs = most_likely(mx.array(logits), keep)
        order = np.argsort(-logits, axis=-1, kind="stable")[:, :keep]
        assert np.array_equal(np.array(ids), order)
        lse = np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        assert np.allclose(logprobs, np.take_along_axis(logits, order, -1) - lse, atol=1e-5)


def test_pooling_is_a_mean_of_rows_where_scores_are_equal(emulator: Emulator) -> None:
    rows = mx.arange(64 * 16).reshape(16, 64).astype(mx.float32)
    _, total, sums = latent_pool_kernel(mx.zeros((3, 64)), rows)
    assert mx.allclose(sums / total, mx.broadcast_to(rows.mean(axis=0), (3, 64)))


def test_a_head_may_hold_frequent_tokens_only(forced: Emulator) -> None:
    x, *rest = quantized(3, 120, 128, 64, 4, mx.float32)
    vocabulary = mx.array(np.sort(np.random.default_rng(0).permutation(5000)[:120]), mx.int32)
    ids, logprobs = lmhead_topk(x, *rest, 6, vocabulary)
    rows, expected = definition(LMHEAD_TOPK.ops, (x, *rest, 6))
    assert mx.array_equal(ids, vocabulary[rows])
    assert mx.allclose(logprobs, expected, atol=1e-5)
    assert forced.launches
