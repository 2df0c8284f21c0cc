r"""The core of `verify_qmm` and `lmhead_topk`: products of a few rows with quantised weights.

    Y^T = W X^T,    W[n, k] = scale[n, g] * q[n, k] + bias[n, g],    g = k / group size

A weight is unpacked once and used for up to 16 rows; MLX's `qmv` reads the weights once a row, its
`qmv_wide` once for five. A threadgroup's 4 simdgroups share 32 rows of W: each takes every fourth
chunk of 128 columns, and their sums are added at the end, in a fixed order.

Which columns meet in an 8 x 8 product does not matter as long as W and X agree. Product j takes
columns 16 c + j, c = 0..7, of a chunk. A lane then needs 32 neighbouring columns of one row of W
and 16 of two rows of X: plain vector loads, no threadgroup memory and no barrier before the end.

A row's result does not depend on how many rows come with it, to the last bit.

Shapes:
    m: rows of X, 1 to 16.    N: rows of W.    K: columns, a multiple of 128.
"""

from __future__ import annotations

import mlx.core as mx

from flash_mlx.kernels.metal import PLACES, TEMPLATES, Constant

BLOCK = 32  # rows of W a threadgroup takes at a time
THREADS = 128
CHUNK = 128  # columns a simdgroup takes at a time
MAX_ROWS = 16
BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
FLOATS = (mx.float16, mx.bfloat16, mx.float32)

HEADER = (
    TEMPLATES
    + PLACES
    + r"""
constant constexpr int FLASH_TILES = 4;       // 8-row tiles of W: 32 rows
constant constexpr int FLASH_SIMDGROUPS = 4;  // of a threadgroup; they share the columns
constant constexpr int FLASH_CHUNK = 128;     // columns of a step

// Adds this simdgroup's share of W[n0 .. n0 + 31] X^T to nothing: acc[t][u] holds rows 8 t .. of W,
// rows 8 u .. of X. Rows beyond N or m repeat the last one.
template <typename T, int BITS, int GROUP, int XTILES>
inline void flash_few_rows(
    const device uint* w, const device T* scales, const device T* biases, const device T* x,
    int n0, int K, int N, int m, uint simd, uint lane,
    thread simdgroup_matrix<float, 8, 8> (&acc)[FLASH_TILES][XTILES]) {
  const int r = flash_row(lane);
  const int c = flash_column(lane);
  const int quarter = c / 2;                  // which 32 columns of the chunk are this lane's
  const size_t row_words = size_t(K) * BITS / 32;
  const size_t row_groups = K / GROUP;
#pragma unroll
  for (int t = 0; t < FLASH_TILES; ++t) {
#pragma unroll
    for (int u = 0; u < XTILES; ++u) {
      acc[t][u] = simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }
  for (int chunk = int(simd); chunk < K / FLASH_CHUNK; chunk += FLASH_SIMDGROUPS) {
    uint packed[FLASH_TILES][BITS];           // 32 weights of BITS bits are BITS words
    float scale[FLASH_TILES];
    float bias[FLASH_TILES];
#pragma unroll
    for (int t = 0; t < FLASH_TILES; ++t) {
      const size_t n = size_t(min(n0 + 8 * t + r, N - 1));
      const device uint* words =
          w + n * row_words + (chunk * FLASH_CHUNK + quarter * 32) * BITS / 32;
#pragma unroll
      for (int i = 0; i < BITS; ++i) {
        packed[t][i] = words[i];
      }
      const size_t group = n * row_groups + (chunk * FLASH_CHUNK + quarter * 32) / GROUP;
      scale[t] = float(scales[group]);
      bias[t] = float(biases[group]);
    }
    float values[XTILES][2][16];
#pragma unroll
    for (int u = 0; u < XTILES; ++u) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const device T* from =
            x + size_t(min(8 * u + c + e, m - 1)) * K + chunk * FLASH_CHUNK + r * 16;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          values[u][e][i] = float(from[i]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      constexpr uint MASK = (1u << BITS) - 1u;
      simdgroup_matrix<float, 8, 8> xj[XTILES];
#pragma unroll
      for (int u = 0; u < XTILES; ++u) {
        xj[u].thread_elements()[0] = values[u][0][j];
        xj[u].thread_elements()[1] = values[u][1][j];
      }
#pragma unroll
      for (int t = 0; t < FLASH_TILES; ++t) {
        const int word = j * BITS / 32;
        const int shift = j * BITS % 32;
        simdgroup_matrix<float, 8, 8> wj;
        wj.thread_elements()[0] = scale[t] * float((packed[t][word] >> shift) & MASK) + bias[t];
        wj.thread_elements()[1] =
            scale[t] * float((packed[t][BITS / 2 + word] >> shift) & MASK) + bias[t];
#pragma unroll
        for (int u = 0; u < XTILES; ++u) {
          simdgroup_multiply_accumulate(acc[t][u], wj, xj[u], acc[t][u]);
        }
      }
    }
  }
}

// Adds the simdgroups' shares: sums[n * 8 XTILES + row of X], n = 0..31.
template <int XTILES>
inline void flash_join(
    thread simdgroup_matrix<float, 8, 8> (&acc)[FLASH_TILES][XTILES], threadgroup float* sums,
    uint simd, uint tid) {
  constexpr int WIDTH = 8 * XTILES;
  constexpr int SIZE = 32 * WIDTH;
  threadgroup_barrier(mem_flags::mem_threadgroup);  // whoever still reads the last sums
#pragma unroll
  for (int t = 0; t < FLASH_TILES; ++t) {
#pragma unroll
    for (int u = 0; u < XTILES; ++u) {
      simdgroup_store(acc[t][u], sums + int(simd) * SIZE + t * 8 * WIDTH + u * 8, WIDTH);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = int(tid); i < SIZE; i += FLASH_SIMDGROUPS * 32) {
    float sum = sums[i];
    for (int s = 1; s < FLASH_SIMDGROUPS; ++s) {
      sum += sums[s * SIZE + i];
    }
    sums[i] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
"""
)


def fits(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int,
    bits: int,
) -> str | None:
    """Return why the core does not take these arguments; None if it does."""
    if x.ndim != 2 or not 1 <= x.shape[0] <= MAX_ROWS:
        return f"1 to {MAX_ROWS} rows"
    if bits not in BITS or group_size not in GROUP_SIZES:
        return "4 or 8 bits in groups of 32, 64 or 128"
    size = x.shape[1]
    if size % CHUNK or weight.ndim != 2 or weight.shape[1] * 32 != size * bits:
        return f"a number of columns that is a multiple of {CHUNK}"
    if x.dtype not in FLOATS or scales.dtype != x.dtype or biases.dtype != x.dtype:
        return "scales, biases and rows of one float type"
    if weight.dtype != mx.uint32 or weight.size < CHUNK or scales.size < 8:
        return "packed weights of 32-bit words, and enough of them"
    return None


def template(
    x: mx.array, weight: mx.array, group_size: int, bits: int
) -> list[tuple[str, Constant]]:
    """Return the constants that the core's callers are compiled with."""
    rows, size = x.shape
    return [
        ("T", x.dtype),
        ("BITS", bits),
        ("GROUP", group_size),
        ("XTILES", 1 if rows <= 8 else 2),
        ("K", size),
        ("N", weight.shape[0]),
    ]
