r"""The k most likely tokens of an LM head, without its logits.

    L = X W^T                    logits, float32, never written
    ids = the k largest of each row of L, the lowest id among equals
    logprobs = L[ids] - log sum exp L

A tile of 256 tokens keeps its k best, its largest logit and the sum of exp(logit - largest); a
second kernel joins the tiles. Sorting on Metal, and so `mx.topk`, is a dozen dependent launches
over all of V; this is two.

Shapes:
    m: rows, 1 to 16.    V: tokens, rows of W.    K: hidden size.    G: groups of a row.
    k: tokens kept.    TILES: V / 256 rounded up.
"""

from __future__ import annotations

import mlx.core as mx

from flash_mlx.kernels import few_rows
from flash_mlx.kernels.dispatch import Kernel, run
from flash_mlx.kernels.few_rows import HEADER, THREADS
from flash_mlx.kernels.metal import TEMPLATES, Constant, Source, launch, padded, scalar

TILE = 256  # tokens
MAX_KEPT = 32
JOINERS = 256  # threads of the second kernel

TILES = Source(
    name="flash_lmhead_tiles",
    inputs=("x", "w", "scales", "biases", "count"),
    outputs=("values", "ids", "largest", "total"),
    header=HEADER,
    body=r"""
  // Threadgroup: 256 tokens, as 8 blocks of 32; a simdgroup looks after every fourth row of x, and
  // a lane after one token of each block. values, ids [m, TILES, KEEP]; largest, total [m, TILES].
  constexpr int OWN = 2 * XTILES;  // rows of x per simdgroup
  const int rows = count;
  const uint simd = simdgroup_index_in_threadgroup;
  const uint lane = thread_index_in_simdgroup;
  const uint tid = thread_index_in_threadgroup;
  const int tile = int(threadgroup_position_in_grid.y);
  threadgroup float sums[FLASH_SIMDGROUPS * 32 * 8 * XTILES];
  simdgroup_matrix<float, 8, 8> acc[FLASH_TILES][XTILES];
  float logit[OWN][8];
#pragma unroll
  for (int block = 0; block < 8; ++block) {
    const int n0 = tile * 256 + block * 32;
    if (n0 < N) {
      flash_few_rows<T, BITS, GROUP, XTILES>(
          w, scales, biases, x, n0, K, N, rows, simd, lane, acc);
      flash_join<XTILES>(acc, sums, simd, tid);
    }
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int row = int(simd) + FLASH_SIMDGROUPS * i;
      logit[i][block] =
          n0 + int(lane) < N ? sums[int(lane) * 8 * XTILES + row] : -INFINITY;
    }
  }
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int row = int(simd) + FLASH_SIMDGROUPS * i;
    if (row >= rows) {
      break;
    }
    float top = -INFINITY;
#pragma unroll
    for (int b = 0; b < 8; ++b) {
      top = max(top, logit[i][b]);
    }
    top = simd_max(top);
    const float base = top == -INFINITY ? 0.0f : top;  // no -inf - -inf
    float sum = 0.0f;
#pragma unroll
    for (int b = 0; b < 8; ++b) {
      sum += metal::precise::exp(logit[i][b] - base);
      logit[i][b] = isnan(logit[i][b]) ? -INFINITY : logit[i][b];  // the sum remembers NaN
    }
    sum = simd_sum(sum);
    const int at = row * TILES + tile;
    if (lane == 0) {
      largest[at] = top;
      total[at] = sum;
    }
    for (int k = 0; k < KEEP; ++k) {
      float best = logit[i][0];
      int block = 0;
#pragma unroll
      for (int b = 1; b < 8; ++b) {
        if (logit[i][b] > best) {
          best = logit[i][b];
          block = b;
        }
      }
      const float winner = simd_max(best);
      const int id =
          simd_min(best == winner ? tile * 256 + block * 32 + int(lane) : 0x7fffffff);
      if (lane == 0) {
        values[at * KEEP + k] = winner;
        ids[at * KEEP + k] = id;
      }
#pragma unroll
      for (int b = 0; b < 8; ++b) {
        if (tile * 256 + b * 32 + int(lane) == id) {
          logit[i][b] = -INFINITY;
        }
      }
    }
  }
""",
)

JOIN = Source(
    name="flash_lmhead_join",
    inputs=("values", "ids", "largest", "total"),
    outputs=("out_ids", "out_logprobs"),
    header=TEMPLATES
    + r"""
// Joins what each lane of 8 simdgroups has; `shared` has 8 places, `nothing` changes no result.
#define FLASH_JOIN(name, type, simd_join, nothing)                                        \
  inline type name(type v, threadgroup type* shared, uint simd, uint lane) {              \
    v = simd_join(v);                                                                     \
    threadgroup_barrier(mem_flags::mem_threadgroup);                                      \
    if (lane == 0) {                                                                      \
      shared[simd] = v;                                                                   \
    }                                                                                     \
    threadgroup_barrier(mem_flags::mem_threadgroup);                                      \
    return simd_join(lane < 8 ? shared[lane] : nothing);                                  \
  }
FLASH_JOIN(flash_largest, float, simd_max, -INFINITY)
FLASH_JOIN(flash_sum, float, simd_sum, 0.0f)
FLASH_JOIN(flash_lowest, int, simd_min, 0x7fffffff)
""",
    body=r"""
  // Threadgroup: one row of x. Rounds of "the best after the last one".
  const uint simd = simdgroup_index_in_threadgroup;
  const uint lane = thread_index_in_simdgroup;
  const int tid = int(thread_index_in_threadgroup);
  const int row = int(threadgroup_position_in_grid.x);
  threadgroup float shared[8];
  threadgroup int shared_ids[8];
  float top = -INFINITY;
  for (int i = tid; i < TILES; i += 256) {
    top = max(top, largest[row * TILES + i]);
  }
  top = flash_largest(top, shared, simd, lane);
  float sum = 0.0f;
  for (int i = tid; i < TILES; i += 256) {
    sum += total[row * TILES + i] * metal::precise::exp(largest[row * TILES + i] - top);
  }
  const float lse = top + metal::precise::log(flash_sum(sum, shared, simd, lane));

  float last = INFINITY;
  int last_id = -1;
  for (int k = 0; k < KEEP; ++k) {
    float best = -INFINITY;
    int best_id = 0x7fffffff;
    for (int i = tid; i < TILES * KEEP; i += 256) {
      const float v = values[row * TILES * KEEP + i];
      const int id = ids[row * TILES * KEEP + i];
      const bool left = v < last || (v == last && id > last_id);
      if (left && (v > best || (v == best && id < best_id))) {
        best = v;
        best_id = id;
      }
    }
    const float winner = flash_largest(best, shared, simd, lane);
    const int id = flash_lowest(best == winner ? best_id : 0x7fffffff, shared_ids, simd, lane);
    if (tid == 0) {
      out_ids[row * KEEP + k] = min(id, N - 1);
      out_logprobs[row * KEEP + k] = winner - lse;
    }
    last = winner;
    last_id = id;
  }
""",
)


def lmhead_topk(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int,
    bits: int,
    keep: int,
    vocabulary: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Return the most likely tokens, by the fastest way that is right on this machine.

    Args:
        x: [m, K] the LM head's inputs.
        weight: [V, K * bits / 32] uint32, packed as `mx.quantize` packs.
        scales: [V, G] of the same type as x.
        biases: [V, G] likewise.
        group_size: Weights that share a scale.
        bits: Of a weight.
        keep: k.
        vocabulary: [V] int32, ascending; the token of each row of W, if W holds only the rows of
            frequent tokens. None: row i is token i.

    Returns:
        Token ids [m, k] int32, the most likely first, and their log-probabilities [m, k] float32
        (among the tokens of W).
    """
    ids, logprobs = run(LMHEAD_TOPK, x, weight, scales, biases, group_size, bits, keep)
    return (ids if vocabulary is None else vocabulary[ids]), logprobs


def lmhead_topk_ops(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int,
    bits: int,
    keep: int,
) -> tuple[mx.array, mx.array]:
    """Define `lmhead_topk`."""
    logits = mx.quantized_matmul(x, weight, scales, biases, True, group_size, bits)
    return most_likely(logits, keep)


def most_likely(logits: mx.array, keep: int) -> tuple[mx.array, mx.array]:
    """Return ids and log-probabilities of the largest logits, [m, V], without sorting all of them.

    The k best stand in the k tiles whose largest logits are the largest; only these are sorted.
    """
    rows, vocab_size = logits.shape
    wide = logits.astype(mx.float32)
    lse = mx.logsumexp(wide, axis=-1, keepdims=True)
    if keep == 1:
        token = mx.argmax(logits, axis=-1, keepdims=True)
        return token.astype(mx.int32), mx.take_along_axis(wide, token, axis=-1) - lse
    tiles = mx.pad(wide, [(0, 0), (0, -vocab_size % TILE)], constant_values=-mx.inf)
    tiles = tiles.reshape(rows, -1, TILE)
    best = mx.sort(mx.argsort(-tiles.max(axis=-1), axis=-1)[:, :keep], axis=-1)
    found = mx.take_along_axis(tiles, best[..., None], axis=1).reshape(rows, -1)
    tokens = (best[..., None] * TILE + mx.arange(TILE)).reshape(rows, -1)
    order = mx.argsort(-found, axis=-1)[:, :keep]
    logprobs = mx.take_along_axis(found, order, axis=-1) - lse
    return mx.take_along_axis(tokens, order, axis=-1).astype(mx.int32), logprobs


def lmhead_topk_kernel(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int,
    bits: int,
    keep: int,
) -> list[mx.array]:
    """Launch `lmhead_topk`: two kernels."""
    rows, vocab_size = x.shape[0], weight.shape[0]
    tiles = -(-vocab_size // TILE)
    each, kept = (rows * tiles,), (rows * tiles * keep,)
    shared: list[tuple[str, Constant]] = [("TILES", tiles), ("KEEP", keep)]
    found = launch(
        TILES,
        [x, weight, scales, biases, scalar(rows)],
        [(kept, mx.float32), (kept, mx.int32), (each, mx.float32), (each, mx.float32)],
        grid=(THREADS, tiles, 1),
        threadgroup=(THREADS, 1, 1),
        template=[*few_rows.template(x, weight, group_size, bits), *shared],
    )
    return launch(
        JOIN,
        [padded(part) for part in found],
        [((rows, keep), mx.int32), ((rows, keep), mx.float32)],
        grid=(JOINERS * rows, 1, 1),
        threadgroup=(JOINERS, 1, 1),
        template=[*shared, ("N", vocab_size)],
    )


def lmhead_topk_fits(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int,
    bits: int,
    keep: int,
) -> str | None:
    """Return why the kernels do not take these arguments; None if they do."""
    if not 1 <= keep <= min(MAX_KEPT, weight.shape[0]):
        return f"1 to {MAX_KEPT} tokens, and no more than there are"
    return few_rows.fits(x, weight, scales, biases, group_size, bits)


LMHEAD_TOPK = Kernel(
    "lmhead_topk", lmhead_topk_ops, lmhead_topk_kernel, lmhead_topk_fits, (TILES, JOIN)
)
