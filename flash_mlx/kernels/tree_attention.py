r"""Attention of a draft tree's rows over the rows before it and over their ancestors.

    O = softmax(scale Q K^T + M) V,    M[i, j] = 0 where row i may see key j, else -inf

The last m keys are the tree's own: row i sees those whose bit is set in its ancestors; it sees all
keys before them. Keys and values are read where the cache keeps them (by their strides), once for
all query heads that share them and for all rows of the tree, and the keys are split over
threadgroups: MLX's fused kernels split them for at most 8 rows, and read them once a head.

A simdgroup holds 8 rows: Q, the sum of weighted values, the largest score and the sum of weights
are in registers; there is no threadgroup memory. A lane's share of the head is d = c D/8 + i, so
that it reads neighbours. A second kernel joins the splits.

Shapes:
    m: rows of the tree.    L: keys, the tree's own m included.    H: query heads.
    Hk: heads of keys and values; G = H / Hk.    D: head size.
    R: rows that share keys, G m.    P: splits.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flash_mlx.kernels.dispatch import Kernel, run
from flash_mlx.kernels.metal import (
    PLACES,
    TEMPLATES,
    Constant,
    Source,
    launch,
    padded,
    scalar,
)

MAX_ROWS = 64
HEAD_SIZES = (64, 80, 96, 128)
FLOATS = (mx.float16, mx.bfloat16, mx.float32)
KEYS_PER_SPLIT, MAX_SPLITS = 256, 32

ATTEND = Source(
    name="flash_tree_attention",
    inputs=("q", "k", "v", "ancestors", "length", "nodes", "splits", "scale"),
    outputs=("partial", "state"),
    header=TEMPLATES + PLACES,
    contiguous=False,
    body=r"""
  // Simdgroup: 8 of the R rows of one key head, every P-th step of 32 keys.
  // q [Hk, R, D], k, v [Hk, L, D] with strides -> partial [Hk, R, P, D], state [Hk, R, P, 2].
  constexpr int SHARE = D / 8;
  constexpr int TILES = 4;  // of 8 keys: a step
  const uint lane = thread_index_in_simdgroup;
  const int r = flash_row(lane);
  const int c = flash_column(lane);
  const int head = int(threadgroup_position_in_grid.z);
  const int split = int(threadgroup_position_in_grid.x);
  const int block = int(thread_position_in_grid.y);
  const int m = nodes;
  const int rows = G * m;
  const int row = min(block * 8 + r, rows - 1);
  const int node = row % m;
  const uint low = ancestors[2 * node];
  const uint high = ancestors[2 * node + 1];
  const int total = length;
  const int own = total - m;                   // the first of the tree's keys
  const float log2_scale = scale * 1.44269504088896f;

  simdgroup_matrix<float, 8, 8> qf[SHARE];
  simdgroup_matrix<float, 8, 8> of[SHARE];
  const device T* query = q + (size_t(head) * rows + row) * D;
#pragma unroll
  for (int i = 0; i < SHARE; ++i) {
    qf[i].thread_elements()[0] = log2_scale * float(query[c * SHARE + i]);
    qf[i].thread_elements()[1] = log2_scale * float(query[(c + 1) * SHARE + i]);
    of[i] = simdgroup_matrix<float, 8, 8>(0.0f);
  }
  float largest = -INFINITY;
  float weight = 0.0f;
  const device T* keys = k + head * k_strides[0];
  const device T* vals = v + head * v_strides[0];

  for (int j0 = split * 8 * TILES; j0 < total; j0 += splits * 8 * TILES) {
    float s[TILES][2];
    float top = largest;
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      simdgroup_matrix<float, 8, 8> scores = simdgroup_matrix<float, 8, 8>(0.0f);
      const int j = j0 + 8 * t + c;
      const device T* first = keys + min(j, total - 1) * k_strides[1] + r * SHARE;
      const device T* second = keys + min(j + 1, total - 1) * k_strides[1] + r * SHARE;
#pragma unroll
      for (int i = 0; i < SHARE; ++i) {
        simdgroup_matrix<float, 8, 8> kf;
        kf.thread_elements()[0] = float(first[i]);
        kf.thread_elements()[1] = float(second[i]);
        simdgroup_multiply_accumulate(scores, qf[i], kf, scores);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int bit = j + e - own;           // of the ancestors; below 0: before the tree
        const uint word = bit < 32 ? low : high;
        const bool seen =
            j + e < total && (bit < 0 || ((word >> uint(bit & 31)) & 1u) != 0u);
        s[t][e] = seen ? scores.thread_elements()[e] : -INFINITY;
        top = max(top, s[t][e]);
      }
    }
    // The eight columns of a row are in lanes that differ in bits 0 and 3.
    top = max(top, simd_shuffle_xor(top, 1));
    top = max(top, simd_shuffle_xor(top, 8));
    const float base = top == -INFINITY ? 0.0f : top;
    const float shrink = metal::precise::exp2(largest - base);
    float sum = 0.0f;
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        s[t][e] = metal::precise::exp2(s[t][e] - base);
        sum += s[t][e];
      }
    }
    sum += simd_shuffle_xor(sum, 1);
    sum += simd_shuffle_xor(sum, 8);
    weight = weight * shrink + sum;
    largest = top;
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
      of[i].thread_elements()[0] *= shrink;
      of[i].thread_elements()[1] *= shrink;
    }
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      simdgroup_matrix<float, 8, 8> p;
      p.thread_elements()[0] = s[t][0];
      p.thread_elements()[1] = s[t][1];
      const int j = j0 + 8 * t + r;
      const bool there = j < total;            // a weight of 0 does not undo an infinity
      const device T* value = vals + min(j, total - 1) * v_strides[1] + c * SHARE;
#pragma unroll
      for (int i = 0; i < SHARE; ++i) {
        simdgroup_matrix<float, 8, 8> vf;
        vf.thread_elements()[0] = there ? float(value[i]) : 0.0f;
        vf.thread_elements()[1] = there ? float(value[SHARE + i]) : 0.0f;
        simdgroup_multiply_accumulate(of[i], p, vf, of[i]);
      }
    }
  }
  if (block * 8 + r < rows) {
    const size_t at = (size_t(head) * rows + row) * splits + split;
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
      partial[at * D + c * SHARE + i] = of[i].thread_elements()[0];
      partial[at * D + (c + 1) * SHARE + i] = of[i].thread_elements()[1];
    }
    if (c == 0) {
      state[2 * at] = largest;
      state[2 * at + 1] = weight;
    }
  }
""",
)

JOIN = Source(
    name="flash_tree_join",
    inputs=("partial", "state", "splits"),
    outputs=("out",),
    body=r"""
  // Thread: one element. partial [H m, P, D], state [H m, P, 2] -> out [H m, D].
  const int d = int(thread_position_in_grid.x);
  const int row = int(thread_position_in_grid.y);
  const device float* states = state + 2 * row * splits;
  float largest = -INFINITY;
  for (int p = 0; p < splits; ++p) {
    largest = max(largest, states[2 * p]);
  }
  float weight = 0.0f;
  float sum = 0.0f;
  for (int p = 0; p < splits; ++p) {
    const float f = metal::precise::exp2(states[2 * p] - largest);
    weight += f * states[2 * p + 1];
    sum += f * partial[(size_t(row) * splits + p) * D + d];
  }
  out[size_t(row) * D + d] = static_cast<T>(sum / weight);
""",
)


def tree_attention(
    queries: mx.array, keys: mx.array, values: mx.array, ancestors: mx.array, scale: float
) -> mx.array:
    """Return the rows' attention, by the fastest way that is right on this machine.

    Args:
        queries: [H, m, D].
        keys: [Hk, L, D], the last m the tree's; a view, if neighbours of a row are neighbours in
            memory.
        values: [Hk, L, D] likewise.
        ancestors: [2 m] uint32 from `ancestor_bits`.
        scale: Of the scores.

    Returns:
        [H, m, D] in the queries' type.
    """
    return run(TREE_ATTENTION, queries, keys, values, ancestors, scale)[0]


def tree_attention_ops(
    queries: mx.array, keys: mx.array, values: mx.array, ancestors: mx.array, scale: float
) -> tuple[mx.array]:
    """Define `tree_attention`."""
    num_rows, length = queries.shape[1], keys.shape[1]
    words = ancestors.reshape(num_rows, 2)
    bits = mx.arange(num_rows, dtype=mx.uint32)
    own = ((words[:, bits // 32] >> (bits % 32)) & 1).astype(mx.bool_)
    mask = mx.concatenate([mx.ones((num_rows, length - num_rows), mx.bool_), own], axis=1)
    attended = mx.fast.scaled_dot_product_attention(
        queries[None], keys[None], values[None], scale=scale, mask=mask
    )
    return (attended[0],)


def tree_attention_kernel(
    queries: mx.array, keys: mx.array, values: mx.array, ancestors: mx.array, scale: float
) -> list[mx.array]:
    """Launch `tree_attention`: two kernels."""
    heads, num_rows, size = queries.shape
    shared, length = keys.shape[0], keys.shape[1]
    splits = min(MAX_SPLITS, -(-length // KEYS_PER_SPLIT))
    blocks = -(-heads // shared * num_rows // 8)
    constants: list[tuple[str, Constant]] = [("T", queries.dtype), ("D", size)]
    partial, state = launch(
        ATTEND,
        [
            mx.contiguous(queries),
            keys,
            values,
            padded(ancestors),
            scalar(length),
            scalar(num_rows),
            scalar(splits),
            scalar(scale, mx.float32),
        ],
        [
            ((heads * num_rows, splits, size), mx.float32),
            ((heads * num_rows * splits * 2,), mx.float32),
        ],
        grid=(32 * splits, blocks, shared),
        threadgroup=(32, min(blocks, 8), 1),
        template=[*constants, ("G", heads // shared)],
    )
    return launch(
        JOIN,
        [partial, padded(state), scalar(splits)],
        [((heads, num_rows, size), queries.dtype)],
        grid=(size, heads * num_rows, 1),
        threadgroup=(size, 1, 1),
        template=constants,
    )


def tree_attention_fits(
    queries: mx.array, keys: mx.array, values: mx.array, ancestors: mx.array, _scale: float
) -> str | None:
    """Return why the kernels do not take these arguments; None if they do."""
    if {queries.ndim, keys.ndim, values.ndim} != {3} or keys.shape != values.shape:
        return "queries [H, m, D] and keys and values of one shape [Hk, L, D]"
    (heads, num_rows, size), (shared, length, _) = queries.shape, keys.shape
    if not 1 <= num_rows <= min(MAX_ROWS, length) or ancestors.shape != (2 * num_rows,):
        return f"1 to {MAX_ROWS} rows whose keys are the last ones"
    if heads % shared or size not in HEAD_SIZES or keys.shape[2] != size:
        return f"heads of {', '.join(map(str, HEAD_SIZES))} numbers"
    if queries.dtype not in FLOATS or {keys.dtype, values.dtype} != {queries.dtype}:
        return "queries, keys and values of one float type"
    return None


def ancestor_bits(mask: npt.NDArray[np.bool_]) -> mx.array:
    """Pack what each row of a tree sees of it.

    Args:
        mask: [m, m] bool, m at most 64; row i is True at itself and at its ancestors.

    Returns:
        [2 m] uint32; bit j of the words 2 i (j < 32) and 2 i + 1 is mask[i, j].
    """
    wide = np.zeros((len(mask), 64), np.bool_)
    wide[:, : len(mask)] = mask
    return mx.array(np.packbits(wide, axis=1, bitorder="little").view(np.uint32).flatten())


TREE_ATTENTION = Kernel(
    "tree_attention", tree_attention_ops, tree_attention_kernel, tree_attention_fits, (ATTEND, JOIN)
)
