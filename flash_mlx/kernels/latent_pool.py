r"""Pooling rows of an image into latents, part by part.

    S = A F^T                    scores, float32, without a scale
    largest = max S              of each latent, over the part's rows
    total = sum exp(S - largest)
    Y = exp(S - largest) F       float32; Y / total is softmax(S) F

Parts of an image are joined by scaling them to the larger of their largest scores.

The definition makes float32 copies of F: for 16,000 rows more memory traffic than anything else
here. The kernels read F twice in its own type and convert in registers; all sums are float32. The
first leaves the scores and, for every chunk of 32 rows, largest and total. The second joins these
and adds up the rows, chunk after chunk.

Shapes:
    M: latents.    N: rows of the part.    D: hidden size.    C: chunks, N / 32 rounded up.
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
    inputs=("queries", "rows", "count", "chunks"),
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
    const bool odd = simd_any(n < n_rows && isnan(s));  // which max would pass over
    const float most = simd_max(s);
    const float top = odd ? NAN : most;
    const float base = top == -INFINITY ? 0.0f : top;  // no -inf - -inf
    const float sum = simd_sum(n < n_rows ? metal::precise::exp(s - base) : 0.0f);
    if (lane == 0) {
      largest[m * chunks + chunk] = top;
      total[m * chunks + chunk] = sum;
    }
  }
""",
)

POOL = Source(
    name="flash_latent_pool",
    inputs=("rows", "scores", "largest", "total", "count", "chunks"),
    outputs=("sums", "part_largest", "part_total"),
    header=TEMPLATES + PLACES,
    body=r"""
  // Threadgroup: 8 simdgroups, each all latents x 8 columns of D.
  // rows [N, D], scores [M, N]; largest, total [M, C] -> sums [M, D]; part_largest, part_total [M].
  constexpr int TILES = (M + 7) / 8;
  const int n_rows = count;
  const uint lane = thread_index_in_simdgroup;
  const int simd = int(simdgroup_index_in_threadgroup);
  const int tid = int(thread_index_in_threadgroup);
  const int r = flash_row(lane);
  const int c = flash_column(lane);
  const int d0 = (int(threadgroup_position_in_grid.x) * 8 + simd) * 8;

  threadgroup float top[TILES * 8];
  threadgroup float weights[TILES * 8 * 32];  // [latent][row of the chunk]
  for (int m = simd; m < TILES * 8; m += 8) {
    float most = -INFINITY;
    bool odd = false;
    for (int i = int(lane); i < chunks && m < M; i += 32) {
      most = max(most, largest[m * chunks + i]);
      odd = odd || isnan(largest[m * chunks + i]);
    }
    most = simd_max(most);
    most = simd_any(odd) ? NAN : most;
    float sum = 0.0f;
    for (int i = int(lane); i < chunks && m < M; i += 32) {
      sum += total[m * chunks + i] * metal::precise::exp(largest[m * chunks + i] - most);
    }
    sum = simd_sum(sum);
    if (lane == 0) {
      top[m] = most;
      if (m < M && threadgroup_position_in_grid.x == 0) {
        part_largest[m] = most;
        part_total[m] = sum;
      }
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
        w = metal::precise::exp(scores[size_t(m) * n_rows + n] - top[m]);
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
      sums[size_t(m) * D + d0 + c] = acc[t].thread_elements()[0];
      sums[size_t(m) * D + d0 + c + 1] = acc[t].thread_elements()[1];
    }
  }
""",
)


Part = tuple[mx.array, mx.array, mx.array]


def latent_pool(queries: mx.array, rows: mx.array) -> Part:
    """Pool rows of an image, by the fastest way that is right on this machine.

    Args:
        queries: [M, D] learned; of the rows' type.
        rows: [N, D] the target's hidden at some of the image's rows.

    Returns:
        Largest score [M, 1], sum of exp(score - largest) [M, 1], and the rows' sum weighted by
        exp(score - largest) [M, D]; float32.
    """
    largest, total, sums = run(LATENT_POOL, queries, rows)
    return largest, total, sums


def latent_pool_ops(queries: mx.array, rows: mx.array) -> Part:
    """Define `latent_pool`; there is no 1/sqrt(D), so scores spread widely and need float32."""
    wide = rows.astype(mx.float32)
    scores = queries.astype(mx.float32) @ wide.T
    largest = scores.max(axis=-1, keepdims=True)
    weights = mx.exp(scores - largest)
    return largest, weights.sum(axis=-1, keepdims=True), weights @ wide


def latent_pool_kernel(queries: mx.array, rows: mx.array) -> Part:
    """Launch `latent_pool`: two kernels."""
    (num_latents, size), num_rows = queries.shape, rows.shape[0]
    chunks = -(-num_rows // CHUNK)
    template: list[tuple[str, Constant]] = [("T", rows.dtype), ("M", num_latents), ("D", size)]
    count, num_chunks = scalar(num_rows), scalar(chunks)
    per_chunk = ((num_latents * chunks,), mx.float32)
    scores, largest, total = launch(
        SCORES,
        [queries, rows, count, num_chunks],
        [((num_latents * num_rows,), mx.float32), per_chunk, per_chunk],
        grid=(128 * chunks, 1, 1),
        threadgroup=(128, 1, 1),
        template=template,
    )
    blocks = -(-size // COLUMNS)
    each = ((num_latents, 1), mx.float32)
    sums, part_largest, part_total = launch(
        POOL,
        [rows, scores, padded(largest), padded(total), count, num_chunks],
        [((num_latents, size), mx.float32), each, each],
        grid=(256 * blocks, 1, 1),
        threadgroup=(256, 1, 1),
        template=template,
    )
    return part_largest, part_total, sums


def latent_pool_fits(queries: mx.array, rows: mx.array) -> str | None:
    """Return why the kernels do not take these arguments; None if they do."""
    if queries.ndim != 2 or rows.ndim != 2 or queries.shape[1] != rows.shape[1]:
        return "queries [M, D] and rows [N, D]"
    if queries.dtype != rows.dtype:
        return "queries and rows of one type"
    if not 1 <= queries.shape[0] <= MAX_LATENTS:
        return f"1 to {MAX_LATENTS} latents"
    if rows.shape[1] % 8 or rows.shape[0] < 8:
        return "a hidden size that is a multiple of 8, and at least 8 rows"
    return None


LATENT_POOL = Kernel(
    "latent_pool", latent_pool_ops, latent_pool_kernel, latent_pool_fits, (SCORES, POOL)
)
