r"""A quantised linear layer for the few rows of a verification.

    Y = X W^T,    W quantised to 4 or 8 bits (see `few_rows`)

Shapes:
    m: rows, 1 to 16.    N: outputs.    K: inputs.    G: groups of a row, K / group size.
"""

from __future__ import annotations

from importlib.metadata import version

import mlx.core as mx

from flash_mlx.kernels import metal
from flash_mlx.kernels.dispatch import Kernel, Rival, run
from flash_mlx.kernels.few_rows import BLOCK, HEADER, MAX_ROWS, THREADS, fits, template
from flash_mlx.kernels.metal import Source, launch, scalar

TENSOR_ROWS = 32  # rows from which MLX takes its kernel for neural accelerators
FIRST_TENSOR_UNITS = 17  # generation of the first GPU that has them, M5's

SOURCE = Source(
    name="flash_verify_qmm",
    inputs=("x", "w", "scales", "biases", "count"),
    outputs=("y",),
    header=HEADER,
    body=r"""
  // Threadgroup: 32 rows of W. x [m, K], w [N, K * BITS / 32] -> y [m, N].
  const int rows = count;
  const uint simd = simdgroup_index_in_threadgroup;
  const uint tid = thread_index_in_threadgroup;
  const int n0 = int(threadgroup_position_in_grid.y) * 32;
  threadgroup float sums[FLASH_SIMDGROUPS * 32 * 8 * XTILES];
  simdgroup_matrix<float, 8, 8> acc[FLASH_TILES][XTILES];
  flash_few_rows<T, BITS, GROUP, XTILES>(
      w, scales, biases, x, n0, K, N, rows, simd, thread_index_in_simdgroup, acc);
  flash_join<XTILES>(acc, sums, simd, tid);
  for (int i = int(tid); i < 32 * rows; i += FLASH_SIMDGROUPS * 32) {
    const int n = i % 32;
    const int row = i / 32;
    if (n0 + n < N) {
      y[size_t(row) * N + n0 + n] = static_cast<T>(sums[n * 8 * XTILES + row]);
    }
  }
""",
)


def verify_qmm(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """Return x W^T, by the fastest way that is right on this machine.

    Args:
        x: [m, K] of a float type.
        weight: [N, K * bits / 32] uint32, packed as `mx.quantize` packs.
        scales: [N, G] of the same type as x.
        biases: [N, G] likewise.
        group_size: Weights that share a scale.
        bits: Of a weight.

    Returns:
        [m, N] in x's type.
    """
    return run(VERIFY_QMM, x, weight, scales, biases, group_size, bits)[0]


def verify_qmm_ops(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> tuple[mx.array]:
    """Define `verify_qmm`. In float32 MLX computes it to the last bits on every backend."""
    return (mx.quantized_matmul(x, weight, scales, biases, True, group_size, bits),)


def verify_qmm_kernel(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> list[mx.array]:
    """Launch `verify_qmm`."""
    rows, outputs = x.shape[0], weight.shape[0]
    return launch(
        SOURCE,
        [x, weight, scales, biases, scalar(rows)],
        [((rows, outputs), x.dtype)],
        grid=(THREADS, -(-outputs // BLOCK), 1),
        threadgroup=(THREADS, 1, 1),
        template=template(x, weight, group_size, bits),
    )


def by_tensor_units(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> tuple[mx.array]:
    """Compute `verify_qmm` with as many rows as MLX takes for its neural-accelerator kernel.

    Below, MLX reads the weights once for every few rows. The bits of a row do not depend on how
    many come with it, for there are always 32.
    """
    filled = mx.pad(x, [(0, TENSOR_ROWS - x.shape[0]), (0, 0)])
    return (verify_qmm_ops(filled, weight, scales, biases, group_size, bits)[0][: x.shape[0]],)


def _tensor_units_fit(x: mx.array, *_: object) -> bool:
    """Whether MLX has that kernel for 16-bit rows of this width, and the rows are few."""
    few = x.ndim == 2 and 2 <= x.shape[0] <= MAX_ROWS
    return few and x.shape[1] % 64 == 0 and x.dtype != mx.float32


TENSOR_UNITS = Rival(
    "MLX's neural-accelerator kernel",
    version("mlx"),
    by_tensor_units,
    lambda: metal.generation() >= FIRST_TENSOR_UNITS,
    _tensor_units_fit,
)
VERIFY_QMM = Kernel(
    "verify_qmm", verify_qmm_ops, verify_qmm_kernel, fits, (SOURCE,), (TENSOR_UNITS,)
)
