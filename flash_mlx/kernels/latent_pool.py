r"""Pooling an image's rows into latents.

    S = A F^T            scores, float32, without a scale
    P = softmax(S)       over the image's rows
    Y = P F

The definition makes a float32 copy of F, which for the 16,000 rows of a long video is larger than
anything else in the prefill. The kernels read F twice in its own type and convert in registers;
all sums are float32. The first leaves the scores and, for every chunk of rows, its largest score
and the sum of exp(score - largest). The second joins the chunks' sums and adds up the rows, chunk
after chunk, each scaled to the largest score of all.

Shapes:
    M: latents.    N: rows of an image.    D: hidden size.    C: chunks, N / 32 rounded up.
"""

from __future__ import annotations

import mlx.core as mx

from flash_mlx.kernels.dispatch import Kernel, run
from flash_mlx.kernels.metal import PLACES, TEMPLATES, Constant, Source, launch, padded, scalar

CHUNK = 32  # image rows of a threadgroup
COLUMNS = 64  # columns of D that a threadgroup of the second kernel sums
MAX_LATENTS = 64

SCORES = Source(
    name="flash_latent_scores",
    inputs=("queries", "rows", "count"),
    outputs=("scores", "largest", "total"),
    header=TEMPLATES + PLACES,
    body=r"""
  // Threadgroup: 4 simdgroups, each 8 image rows against all latents, 8 x 8 scores at a time.
  // queries [M, D], rows [N, D] -> scores [M, N]; largest, total [M, C].
  constexpr int TILES = (M + 7) / 8;
  const int n_rows = count;
  const uint lane = thread_index_in_simdgroup;
  const int simd = int(simdgroup_index_in_threadgroup);
  const int chunk = int(threadgroup_position_in_grid.x);
  const int r = flash_row(lane);
  const int c = flash_column(lane);
  const int n0 = chunk * 32 + simd * 8;

  simdgroup_matrix<float, 8, 8> acc[TILES];
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    acc[t] = simdgroup_matrix<float, 8, 8>(0.0f);
  }
  // Lane's elements of F^T: column d of two image rows; rows beyond the last repeat it.
  const device T* f0 = rows + size_t(min(n0 + c, n_rows - 1)) * D;
  const device T* f1 = rows + size_t(min(n0 + c + 1, n_rows - 1)) * D;
  for (int d = 0; d < D; d += 8) {
    simdgroup_matrix<float, 8, 8> f;
    f.thread_elements()[0] = float(f0[d + r]);
    f.thread_elements()[1] = float(f1[d + r]);
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      const device T* a = queries + size_t(min(t * 8 + r, M - 1)) * D + d + c;
      simdgroup_matrix<float, 8, 8> q;
      q.thread_elements()[0] = float(a[0]);
      q.thread_elements()[1] = float(a[1]);
      simdgroup_multiply_accumulate(acc[t], q, f, acc[t]);
    }
  }

  threadgroup float tile[TILES * 8 * 32];  // [latent][row of the chunk]
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    simdgroup_store(acc[t], tile + t * 8 * 32 + simd * 8, 32);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // One simdgroup a latent, one lane an image row.
  const int n = chunk * 32 + int(lane);
  for (int m = simd; m < M; m += 4) {
    const float s = n < n_rows ? tile[m * 32 + int(lane)] : -INFINITY;
    if (n < n_rows) {
      scores[size_t(m) * n_rows + n] = s;
    }
    const float top = simd_max(s);
    const float base = top == -INFINITY ? 0.0f : top;  // no -inf - -inf
    const float sum = simd_sum(n < n_rows ? metal::precise::exp(s - base) : 0.0f);
    if (lane == 0) {
      largest[m * CHUNKS + chunk] = top;
      total[m * CHUNKS + chunk] = sum;
    }
  }
""",
)

POOL = Source(
    name="flash_latent_pool",
    inputs=("rows", "scores", "largest", "total", "count"),
    outputs=("out",),
    header=TEMPLATES + PLACES,
    body=r"""
  // Threadgroup: 8 simdgroups, each all latents x 8 columns of D.
  // rows [N, D], scores [M, N]; largest, total [M, C] -> out [M, D].
  constexpr int TILES = (M + 7) / 8;
  const int n_rows = count;
  const uint lane = thread_index_in_simdgroup;
  const int simd = int(simdgroup_index_in_threadgroup);
  const int tid = int(thread_index_in_threadgroup);
  const int r = flash_row(lane);
  const int c = flash_column(lane);
  const int d0 = (int(threadgroup_position_in_grid.x) * 8 + simd) * 8;

  threadgroup float top[TILES * 8];
  threadgroup float scale[TILES * 8];
  threadgroup float weights[TILES * 8 * 32];  // [latent][row of the chunk]
  for (int m = simd; m < TILES * 8; m += 8) {
    float most = -INFINITY;
    for (int i = int(lane); i < CHUNKS && m < M; i += 32) {
      most = max(most, largest[m * CHUNKS + i]);
    }
    most = simd_max(most);
    float sum = 0.0f;
    for (int i = int(lane); i < CHUNKS && m < M; i += 32) {
      sum += total[m * CHUNKS + i] * metal::precise::exp(largest[m * CHUNKS + i] - most);
    }
    sum = simd_sum(sum);
    if (lane == 0) {
      top[m] = most;
      scale[m] = m < M ? 1.0f / sum : 0.0f;
    }
  }

  simdgroup_matrix<float, 8, 8> acc[TILES];
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    acc[t] = simdgroup_matrix<float, 8, 8>(0.0f);
  }
  for (int n0 = 0; n0 < n_rows; n0 += 32) {
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the last chunk's weights are read
    for (int i = tid; i < TILES * 8 * 32; i += 256) {
      const int m = i / 32;
      const int n = n0 + i % 32;
      float w = 0.0f;
      if (m < M && n < n_rows) {
        w = metal::precise::exp(scores[size_t(m) * n_rows + n] - top[m]) * scale[m];
      }
      weights[i] = w;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int k = 0; k < 32; k += 8) {
      const int n = n0 + k + r;
      const device T* f = rows + size_t(min(n, n_rows - 1)) * D + min(d0 + c, D - 2);
      simdgroup_matrix<float, 8, 8> fk;
      // A weight of 0 does not undo NaN or inf, so rows beyond the last count as 0.
      fk.thread_elements()[0] = n < n_rows ? float(f[0]) : 0.0f;
      fk.thread_elements()[1] = n < n_rows ? float(f[1]) : 0.0f;
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        simdgroup_matrix<float, 8, 8> w;
        simdgroup_load(w, weights + t * 8 * 32 + k, 32);
        simdgroup_multiply_accumulate(acc[t], w, fk, acc[t]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    const int m = t * 8 + r;
    if (m < M && d0 < D) {
      out[size_t(m) * D + d0 + c] = static_cast<T>(acc[t].thread_elements()[0]);
      out[size_t(m) * D + d0 + c + 1] = static_cast<T>(acc[t].thread_elements()[1]);
    }
  }
""",
)


def latent_pool(queries: mx.array, rows: mx.array) -> mx.array:
    """Return softmax(queries rows^T) rows, by the fastest way that is right on this machine.

    Args:
        queries: [M, D] learned; of the rows' type.
        rows: [N, D] the target's hidden at the image's rows.

    Returns:
        [M, D] in the rows' type.
    """
    return run(LATENT_POOL, queries, rows)[0]


def latent_pool_ops(queries: mx.array, rows: mx.array) -> tuple[mx.array]:
    """Define `latent_pool`; there is no 1/sqrt(D), so scores spread widely and need float32."""
    wide = rows.astype(mx.float32)
    scores = queries.astype(mx.float32) @ wide.T
    return ((mx.softmax(scores, axis=-1) @ wide).astype(rows.dtype),)


def latent_pool_kernel(queries: mx.array, rows: mx.array) -> tuple[mx.array]:
    """Launch `latent_pool`: two kernels."""
    (num_latents, size), num_rows = queries.shape, rows.shape[0]
    chunks = -(-num_rows // CHUNK)
    template: list[tuple[str, Constant]] = [
        ("T", rows.dtype),
        ("M", num_latents),
        ("D", size),
        ("CHUNKS", chunks),
    ]
    count = scalar(num_rows)
    per_chunk = ((num_latents * chunks,), mx.float32)
    scores, largest, total = launch(
        SCORES,
        [queries, rows, count],
        [((num_latents * num_rows,), mx.float32), per_chunk, per_chunk],
        grid=(128 * chunks, 1, 1),
        threadgroup=(128, 1, 1),
        template=template,
    )
    blocks = -(-size // COLUMNS)
    (pooled,) = launch(
        POOL,
        [rows, scores, padded(largest), padded(total), count],
        [((num_latents, size), rows.dtype)],
        grid=(256 * blocks, 1, 1),
        threadgroup=(256, 1, 1),
        template=template,
    )
    return (pooled,)


def latent_pool_fits(queries: mx.array, rows: mx.array) -> str | None:
    """Return why the kernels do not take these arguments; None if they do."""
    if queries.ndim != 2 or rows.ndim != 2 or queries.shape[1] != rows.shape[1]:
        return "queries [M, D] and rows [N, D]"
    if queries.dtype != rows.dtype:
        return "queries and rows of one type"
    if queries.shape[0] > MAX_LATENTS:
        return f"at most {MAX_LATENTS} latents"
    if rows.shape[1] % 8 or rows.shape[0] < 8:
        return "a hidden size that is a multiple of 8, and at least 8 rows"
    return None


LATENT_POOL = Kernel(
    "latent_pool", latent_pool_ops, latent_pool_kernel, latent_pool_fits, (SCORES, POOL)
)
