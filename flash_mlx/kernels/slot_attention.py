r"""The attention step of the drafter: k slots over its cache and over the rows just read.

    q, k, v = rows of the joined projection; q and k rotated to their positions (RoPE)
    O[i] = softmax(q[i] K^T / sqrt(D)) V    over the cache and the new rows up to slot i's own

In MLX's operations that is a rotation, two writes, an attention and copies between their layouts:
for a context of some hundred rows their launches take longer than their work. One kernel does it,
a threadgroup a head: it rotates the new rows, hands keys and values back in the cache's layout, and
its 8 simdgroups share the keys. Where the cache keeps them is another write, of these rows alone.

Shapes:
    R: new rows; the last k are the slots.    S: rows of the cache that count.
    H: heads.    D: head size.    k: slots.
"""

from __future__ import annotations

import math
from functools import cache

import mlx.core as mx

from flash_mlx.buffer import write_rows
from flash_mlx.kernels.dispatch import Kernel, run
from flash_mlx.kernels.metal import Constant, Source, launch, scalar

MAX_SLOTS = 8
MAX_NUMBERS = 2048  # R D: keys and values of the new rows fit in threadgroup memory
HEAD_SIZES = (64, 80, 96, 128)
FLOATS = (mx.float16, mx.bfloat16, mx.float32)

SOURCE = Source(
    name="flash_slot_attention",
    inputs=("joined", "keys", "values", "start", "speeds"),
    outputs=("attended", "new_keys", "new_values"),
    contiguous=False,
    body=r"""
  // Threadgroup: a head. joined [R, 3, H, D]; keys, values [1, H, >= S, D] with strides
  // -> attended [SLOTS, H, D]; new_keys, new_values [H, R, D].
  constexpr int HALF = D / 2;
  constexpr int OWN = (D + 31) / 32;           // numbers of a head that a lane holds: lane + 32 i
  const int tid = int(thread_index_in_threadgroup);
  const int simd = int(simdgroup_index_in_threadgroup);
  const int lane = int(thread_index_in_simdgroup);
  const int head = int(threadgroup_position_in_grid.x);
  const int old = start;
  threadgroup float fresh_q[SLOTS * D];
  threadgroup float fresh_k[R * D];
  threadgroup float fresh_v[R * D];

  // Rotate numbers d and d + D/2 of each new row by position * speeds[d].
  for (int i = tid; i < R * HALF; i += 256) {
    const int row = i / HALF;
    const int d = i % HALF;
    const float angle = float(old + row) * speeds[d];
    const float cosine = metal::precise::cos(angle);
    const float sine = metal::precise::sin(angle);
    const device T* q = joined + size_t(row * 3 * H + head) * D;
    const device T* k = q + H * D;
    const device T* v = k + H * D;
    const float k0 = float(k[d]);
    const float k1 = float(k[d + HALF]);
    // Later passes read these keys from the cache, so they are rounded to its type here too.
    const T r0 = static_cast<T>(k0 * cosine - k1 * sine);
    const T r1 = static_cast<T>(k0 * sine + k1 * cosine);
    fresh_k[row * D + d] = float(r0);
    fresh_k[row * D + d + HALF] = float(r1);
    fresh_v[row * D + d] = float(v[d]);
    fresh_v[row * D + d + HALF] = float(v[d + HALF]);
    const size_t at = (size_t(head) * R + row) * D + d;
    new_keys[at] = r0;
    new_keys[at + HALF] = r1;
    new_values[at] = v[d];
    new_values[at + HALF] = v[d + HALF];
    const int slot = row - (R - SLOTS);
    if (slot >= 0) {
      const float q0 = float(q[d]);
      const float q1 = float(q[d + HALF]);
      const float scale = metal::precise::rsqrt(float(D)) * 1.44269504088896f;
      fresh_q[slot * D + d] = scale * (q0 * cosine - q1 * sine);
      fresh_q[slot * D + d + HALF] = scale * (q0 * sine + q1 * cosine);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float q[SLOTS][OWN];
  float sum[SLOTS][OWN];
  float largest[SLOTS];
  float weight[SLOTS];
#pragma unroll
  for (int s = 0; s < SLOTS; ++s) {
    largest[s] = -INFINITY;
    weight[s] = 0.0f;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int d = lane + 32 * i;
      q[s][i] = d < D ? fresh_q[s * D + d] : 0.0f;
      sum[s][i] = 0.0f;
    }
  }
  for (int j = simd; j < old + R; j += 8) {    // this simdgroup's keys
    const int row = j - old;                   // of the new rows; below 0: in the cache
    float k[OWN];
    float v[OWN];
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int d = lane + 32 * i;
      k[i] = 0.0f;
      v[i] = 0.0f;
      if (d < D && row < 0) {
        k[i] = float(keys[head * keys_strides[1] + j * keys_strides[2] + d]);
        v[i] = float(values[head * values_strides[1] + j * values_strides[2] + d]);
      } else if (d < D) {
        k[i] = fresh_k[row * D + d];
        v[i] = fresh_v[row * D + d];
      }
    }
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      if (row > s + R - SLOTS) {
        continue;                              // after slot s; all lanes agree
      }
      float score = 0.0f;
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        score += q[s][i] * k[i];
      }
      score = simd_sum(score);
      const float top = max(largest[s], score);
      const float from = top == -INFINITY ? 0.0f : top;
      const float shrink = metal::precise::exp2(largest[s] - from);
      const float w = metal::precise::exp2(score - from);
      weight[s] = weight[s] * shrink + w;
      largest[s] = top;
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        sum[s][i] = sum[s][i] * shrink + w * v[i];
      }
    }
  }

  // Join the simdgroups, slot by slot.
  threadgroup float tops[8];
  threadgroup float weights[8];
  threadgroup float sums[8 * D];
#pragma unroll
  for (int s = 0; s < SLOTS; ++s) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (lane == 0) {
      tops[simd] = largest[s];
      weights[simd] = weight[s];
    }
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int d = lane + 32 * i;
      if (d < D) {
        sums[simd * D + d] = sum[s][i];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (tid < D) {
      float top = tops[0];
      for (int p = 1; p < 8; ++p) {
        top = max(top, tops[p]);
      }
      float all = 0.0f;
      float value = 0.0f;
      for (int p = 0; p < 8; ++p) {
        const float f = metal::precise::exp2(tops[p] - top);
        all += f * weights[p];
        value += f * sums[p * D + tid];
      }
      attended[(size_t(s) * H + head) * D + tid] = static_cast<T>(value / all);
    }
  }
""",
)


Attended = tuple[mx.array, mx.array, mx.array]


def slot_attention(
    joined: mx.array, keys: mx.array, values: mx.array, start: int, slots: int, rope_base: float
) -> Attended:
    """Attend and write the cache, by the fastest way that is right on this machine.

    Args:
        joined: [R, 3, H, D] queries, keys and values of the new rows, not rotated.
        keys: [1, H, capacity, D] rotated keys of earlier rows; from `start` on they are not read.
        values: [1, H, capacity, D] likewise.
        start: S, which is also the position of the first new row.
        slots: k.
        rope_base: Of the rotary positions.

    Returns:
        [k, H, D] attended; keys and values with the new rows at `start`, larger if need be.
    """
    attended, keys, values = run(SLOT_ATTENTION, joined, keys, values, start, slots, rope_base)
    return attended, keys, values


def slot_attention_ops(
    joined: mx.array, keys: mx.array, values: mx.array, start: int, slots: int, rope_base: float
) -> Attended:
    """Define `slot_attention`."""
    num_rows, size = joined.shape[0], joined.shape[-1]
    queries, keys, values = turn_and_write(joined, keys, values, start, rope_base)
    end = start + num_rows
    attended = mx.fast.scaled_dot_product_attention(
        queries[:, :, num_rows - slots :],
        keys[:, :, :end],
        values[:, :, :end],
        scale=size**-0.5,
        mask="causal",
    )
    return attended[0].swapaxes(0, 1), keys, values


def turn_and_write(
    joined: mx.array, keys: mx.array, values: mx.array, start: int, rope_base: float
) -> Attended:
    """Return the rotated queries [1, H, R, D], and the cache with the new rows, as above."""
    num_rows, _, heads, size = joined.shape
    # [R, 3, H, D] -> [1, 3 * H, R, D]; queries and keys are rotated together.
    by_head = joined.reshape(1, num_rows, 3 * heads, size).swapaxes(1, 2)
    turned = mx.fast.rope(
        by_head[:, : 2 * heads], size, traditional=False, base=rope_base, scale=1, offset=start
    )
    return (
        turned[:, :heads],
        write_rows(keys, turned[:, heads:], start),
        write_rows(values, by_head[:, 2 * heads :], start),
    )


def slot_attention_kernel(
    joined: mx.array, keys: mx.array, values: mx.array, start: int, slots: int, rope_base: float
) -> Attended:
    """Launch `slot_attention`: one kernel, and the new rows put in their place."""
    num_rows, _, heads, size = joined.shape
    new = ((1, heads, num_rows, size), joined.dtype)
    constants: list[tuple[str, Constant]] = [
        ("T", joined.dtype),
        ("R", num_rows),
        ("SLOTS", slots),
        ("H", heads),
        ("D", size),
    ]
    attended, new_keys, new_values = launch(
        SOURCE,
        [mx.contiguous(joined), keys, values, scalar(start), _speeds(rope_base, size)],
        [((slots, heads, size), joined.dtype), new, new],
        grid=(256 * heads, 1, 1),
        threadgroup=(256, 1, 1),
        template=constants,
    )
    return attended, write_rows(keys, new_keys, start), write_rows(values, new_values, start)


def slot_attention_fits(
    joined: mx.array, keys: mx.array, values: mx.array, start: int, slots: int, _rope_base: float
) -> str | None:
    """Return why the kernel does not take these arguments; None if it does."""
    if joined.ndim != 4 or joined.shape[1] != 3 or keys.ndim != 4 or keys.shape != values.shape:
        return "new rows [R, 3, H, D] and keys and values of one shape [1, H, S, D]"
    num_rows, _, heads, size = joined.shape
    if not 1 <= slots <= min(MAX_SLOTS, num_rows) or num_rows * size > MAX_NUMBERS:
        return f"1 to {MAX_SLOTS} slots and {MAX_NUMBERS} numbers a head in new rows"
    if size not in HEAD_SIZES or (keys.shape[1], keys.shape[3]) != (heads, size):
        return f"heads of {', '.join(map(str, HEAD_SIZES))} numbers"
    if not 1 <= start <= keys.shape[2]:
        return "a cache that is not empty"
    if joined.dtype not in FLOATS or {keys.dtype, values.dtype} != {joined.dtype}:
        return "rows, keys and values of one float type"
    return None


@cache
def _speeds(rope_base: float, size: int) -> mx.array:
    """Return base^(-2 d / D), [D / 2] float32, rounded as MLX's definition of RoPE rounds it.

    At position 4096, the last bit of a speed is an error of 1e-4 in the keys.
    """
    half = size // 2
    return mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * (math.log(rope_base) / half))


SLOT_ATTENTION = Kernel(
    "slot_attention", slot_attention_ops, slot_attention_kernel, slot_attention_fits, (SOURCE,)
)
