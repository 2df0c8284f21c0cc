"""The emulator itself: what it computes, and that it notices what Metal leaves undefined."""

import re

import mlx.core as mx
import numpy as np
import pytest

from emulator import (
    QUICK,
    Call,
    EmulationError,
    Emulator,
    KernelText,
    check_language,
    generate,
    mlx_text,
    why_not,
)
from emulator.compiler import CompileError

REAL = mx.fast.metal_kernel

# 64 threads, two simdgroups: each thread adds its mirror image, through threadgroup memory.
MIRROR = """
  threadgroup float shared[64];
  const uint t = thread_index_in_threadgroup;
  shared[t] = inp[t];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[t] = shared[63 - t] + simd_sum(shared[t]);
"""
VALUES = mx.arange(64).astype(mx.float32)


def mirror(emulator: Emulator, source: str, threads: int = 64, **options: object) -> mx.array:
    kernel = emulator.metal_kernel("mirror", ["inp"], ["out"], source)
    (out,) = kernel(
        inputs=[VALUES],
        output_shapes=[(64,)],
        output_dtypes=[mx.float32],
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
        **options,
    )
    return out


def test_threads_meet_at_barriers_and_in_simdgroups(emulator: Emulator) -> None:
    halves = np.repeat(np.arange(64).reshape(2, 32).sum(axis=1), 32)
    assert mirror(emulator, MIRROR).tolist() == (np.arange(64)[::-1] + halves).tolist()
    assert emulator.launches[0].threadgroup_bytes == 256


FAULTS = {
    "read past the end": ("= inp[t]", "= inp[t + 1]", "'inp', 0 bytes past its end"),
    "read before the start": ("inp[t]", "inp[int(t) - 1]", "'inp', 4 bytes before its start"),
    "write past the end": ("out[t] =", "out[t + 1] =", "'out', 0 bytes past its end"),
    "no barrier": ("threadgroup_barrier(mem_flags::mem_threadgroup);", "", "depends on the order"),
    "barrier of the simdgroup only": ("threadgroup_b", "simdgroup_b", "depends on the order"),
    "barrier that half of the threads pass": (
        "threadgroup_barrier",
        "if (t < 32) threadgroup_barrier",
        "have returned",
    ),
    "barriers in two places": (
        "threadgroup_barrier(mem_flags::mem_threadgroup);",
        "if (t < 32) threadgroup_barrier(mem_flags::mem_threadgroup);\n"
        "else threadgroup_barrier(mem_flags::mem_threadgroup);",
        "different barriers",
    ),
    "simdgroups that part": (
        "simd_sum(shared[t])",
        "(t % 2 ? simd_sum(shared[t]) : simd_max(shared[t]))",
        "divergent simdgroup operation",
    ),
    "an output that is not written": ("out[t] =", "if (t < 63) out[t] =", "not written"),
    "a variable that is not written": ("out[t] =", "float v; out[t] = v +", None),
    "threadgroup memory that is not written": (
        "shared[t] = inp[t];",
        "if (t) shared[t] = inp[t];",
        "not written",
    ),
    "too much threadgroup memory": ("shared[64]", "shared[8193]", "limited to 32768 bytes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_metal_leaves_undefined_is_noticed(fault: str, emulator: Emulator) -> None:
    right, wrong, message = FAULTS[fault]
    assert right in MIRROR
    if message is None:  # it runs, and what it says is no number anybody would expect
        assert mx.abs(mirror(emulator, MIRROR.replace(right, wrong))).max().item() > 1e9
        return
    with pytest.raises(EmulationError, match=message):
        mirror(emulator, MIRROR.replace(right, wrong))


def test_a_private_array_that_is_left_is_noticed(emulator: Emulator) -> None:
    source = """
      const uint t = thread_position_in_grid.x;
      float four[4];
      for (int i = 0; i < 5; ++i) { four[i] = inp[t]; }
      out[t] = four[int(inp[t]) & 3];
    """
    with pytest.raises(EmulationError, match="undefined behaviour"):
        mirror(Emulator(traps=True), source)


def test_without_a_compiler_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert "needs g++ 12" in str(why_not())


def test_a_threadgroup_has_at_most_1024_threads(emulator: Emulator) -> None:
    with pytest.raises(EmulationError, match="at most 1024 threads"):
        mirror(emulator, "out[0] = inp[0];", threads=1025)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("bfloat x = 1.5f;", "conversion"),
        ("int x = max(1, 2u);", "ambiguous"),
        ("out[0] = nowhere;", "nowhere"),
    ],
)
def test_what_metal_refuses_does_not_compile(
    statement: str, message: str, emulator: Emulator
) -> None:
    with pytest.raises(CompileError, match=message):
        mirror(emulator, statement)


def test_grids_may_be_ragged_and_strides_kept(emulator: Emulator) -> None:
    kernel = KernelText(
        "transpose",
        ["inp"],
        ["out"],
        "const uint3 p = thread_position_in_grid;\n"
        "out[p.x * 3 + p.y] = inp[elem_to_loc(p.x * 3 + p.y, inp_shape, inp_strides, inp_ndim)];",
        ensure_row_contiguous=False,
    )
    array = mx.arange(15).reshape(3, 5).T
    call = Call([array], [(5, 3)], [array.dtype], (5, 3, 1), (4, 2, 1))
    (out,) = emulator.run(kernel, call)
    assert mx.array_equal(out, array)


def test_atomics_add_up() -> None:
    kernel = KernelText(
        "count",
        ["inp"],
        ["out"],
        "atomic_fetch_add_explicit(&out[thread_position_in_grid.x % 3], inp[0], "
        "memory_order_relaxed);",
        atomic_outputs=True,
    )
    call = Call([mx.array([2])], [(3,)], [mx.int32], (100, 1, 1), (32, 1, 1), (), 1)
    (out,) = Emulator(QUICK).run(kernel, call)
    assert out.tolist() == [69, 67, 67]


def test_simdgroup_matrices_multiply(emulator: Emulator) -> None:
    source = """
      simdgroup_matrix<float, 8, 8> a, b, c = simdgroup_matrix<float, 8, 8>(1.0f);
      simdgroup_load(a, inp, 8);
      simdgroup_load(b, inp, 8, ulong2(0), true);
      simdgroup_multiply_accumulate(c, a, b, c);
      simdgroup_store(c, out, 8);
    """
    out = mirror(emulator, source, threads=32)
    a = np.arange(64.0).reshape(8, 8)
    assert np.array_equal(np.array(out).reshape(8, 8), a @ a.T + np.eye(8))


def test_the_corners_of_the_text_are_mlx_own(emulator: Emulator) -> None:
    atomic = KernelText(
        "corners",
        ["a", "b"],
        ["o"],
        "if (FLAG) { atomic_fetch_add_explicit(&o[0], a[0] * b + a_shape[0] + int(a_strides[0]) "
        "+ a_ndim + thread_position_in_grid.x, memory_order_relaxed); }",
        atomic_outputs=True,
    )
    plain = KernelText("plain", ["a"], ["o", "p"], "o[0] = a[0]; p[0] = a[1];")
    template = [("FLAG", True), ("N", 3), ("T", mx.bool_), ("U", mx.bfloat16)]
    one = (1, 1, 1)
    calls = [
        (
            atomic,
            Call([mx.zeros((2, 2)), mx.array(1.0)], [(1,)], [mx.float32], one, one, template, 0),
        ),
        (plain, Call([mx.zeros(9, mx.int64)], [(1,), (1,)], [mx.uint8, mx.float16], one, one)),
    ]
    for kernel, call in calls:
        emulator.run(kernel, call)
        ours = emulator.launches[-1].generated.text
        assert ours.strip() == mlx_text(REAL, kernel, call).strip()


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("threadgroup float* p = out;", "address space|cannot initialize"),
        ("const device float* p = small;", "cannot initialize"),
        ("device float* p = out; float* q = &p[1];", "without an address space"),
        ("int i = 0 out[0] = 1;", "expected"),
    ],
)
def test_clang_knows_address_spaces(statement: str, message: str, emulator: Emulator) -> None:
    kernel = KernelText("spaces", ["small"], ["out"], statement)
    call = Call([mx.zeros(2)], [(1,)], [mx.float32], (1, 1, 1), (1, 1, 1))
    text = generate(kernel, call).text
    assert any(re.search(message, found) for found in check_language(text)), text
