// Barriers, simdgroup and quadgroup functions. All come down to one `emu::exchange`: every lane shows
// its value and reads those of the others. `__builtin_LINE` tells which call of the kernel it was.
#pragma once
#include "machine.h"
#include "msl_math.h"

#define CALL_LINE int line = __builtin_LINE()

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
inline constexpr int thread_scope_threadgroup = 1, thread_scope_simdgroup = 2;
inline constexpr int thread_scope_device = 3;

inline void threadgroup_barrier(mem_flags, CALL_LINE) { emu::barrier(line, false); }
inline void simdgroup_barrier(mem_flags, CALL_LINE) { emu::barrier(line, true); }

// One number for each function, so that lanes that meet in different ones are told apart.
enum Operation {
  SUM, PRODUCT, MAX, MIN, AND, OR, XOR, ANY, ALL, BALLOT, BROADCAST, SHUFFLE, SHUFFLE_XOR,
  SHUFFLE_DOWN, SHUFFLE_UP, ROTATE_DOWN, ROTATE_UP, FILL_UP, FILL_UP_WITH, INCLUSIVE, EXCLUSIVE,
  FIRST, IS_FIRST, QUAD_SUM, QUAD_MAX, QUAD_XOR, LOAD, STORE, MULTIPLY
};

template <class T>
inline T slot_value(const emu::Slot* slots, int lane) {
  T value;
  memcpy((void*)&value, slots[lane].bytes, sizeof(T));
  return value;
}

// Combines the values of all active lanes, as a butterfly does: i with i + 16, then with i + 8, ...
template <class T, class F>
inline T simd_reduce(T value, F combine, int line, int operation) {
  uint active;
  const emu::Slot* slots = emu::exchange(&value, sizeof(T), line, operation, &active);
  T values[emu::LANES];
  bool on[emu::LANES];
  for (int i = 0; i < emu::LANES; ++i) {
    on[i] = active >> i & 1;
    if (on[i]) values[i] = slot_value<T>(slots, i);
  }
  for (int step = emu::LANES / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) {
      if (!on[i + step]) continue;
      values[i] = on[i] ? combine(values[i], values[i + step]) : values[i + step];
      on[i] = true;
    }
  return values[0];
}

// The value of lane `source`; of a lane that takes no part it is undefined: all bits are set.
template <class T>
inline T simd_read(T value, int source, int line, int operation) {
  uint active;
  const emu::Slot* slots = emu::exchange(&value, sizeof(T), line, operation, &active);
  if (source >= 0 && source < emu::LANES && (active >> source & 1))
    return slot_value<T>(slots, source);
  T undefined;
  memset((void*)&undefined, 0xff, sizeof(T));
  return undefined;
}

// The same, but a source outside the simdgroup leaves the lane its own value.
template <class T>
inline T simd_read_or_keep(T value, int source, int line, int operation) {
  T other = simd_read(value, source & (emu::LANES - 1), line, operation);
  return source < 0 || source >= emu::LANES ? value : other;
}

#define REDUCTION(name, operation, expression)                                              \
  template <class T>                                                                        \
  inline T name(T value, CALL_LINE) {                                                       \
    return simd_reduce(value, [](T a, T b) { return T(expression); }, line, operation);     \
  }
REDUCTION(simd_sum, SUM, a + b)
REDUCTION(simd_product, PRODUCT, a * b)
REDUCTION(simd_max, MAX, max(a, b))
REDUCTION(simd_min, MIN, min(a, b))
REDUCTION(simd_and, AND, a & b)
REDUCTION(simd_or, OR, a | b)
REDUCTION(simd_xor, XOR, a ^ b)
#undef REDUCTION

inline bool simd_any(bool value, CALL_LINE) {
  return simd_reduce(value, [](bool a, bool b) { return a || b; }, line, ANY);
}
inline bool simd_all(bool value, CALL_LINE) {
  return simd_reduce(value, [](bool a, bool b) { return a && b; }, line, ALL);
}

struct simd_vote {
  typedef uint64_t vote_t;
  vote_t bits;
  simd_vote(vote_t bits) : bits(bits) {}
  explicit operator vote_t() const { return bits; }
  bool any() const { return bits; }
  bool all() const { return bits == 0xffffffffu; }
};
inline simd_vote simd_ballot(bool value, CALL_LINE) {
  uint bit = value ? 1u << emu::lane() : 0;
  return simd_vote(simd_reduce(bit, [](uint a, uint b) { return a | b; }, line, BALLOT));
}
inline simd_vote simd_active_threads_mask(CALL_LINE) { return simd_ballot(true, line); }

#define SHUFFLE_FUNCTION(name, read, operation, source)                                     \
  template <class T>                                                                        \
  inline T name(T value, ushort by, CALL_LINE) {                                            \
    return read(value, source, line, operation);                                            \
  }
SHUFFLE_FUNCTION(simd_broadcast, simd_read, BROADCAST, by)
SHUFFLE_FUNCTION(simd_shuffle, simd_read, SHUFFLE, by)
SHUFFLE_FUNCTION(simd_shuffle_xor, simd_read, SHUFFLE_XOR, emu::lane() ^ by)
SHUFFLE_FUNCTION(simd_shuffle_down, simd_read_or_keep, SHUFFLE_DOWN, emu::lane() + by)
SHUFFLE_FUNCTION(simd_shuffle_up, simd_read_or_keep, SHUFFLE_UP, emu::lane() - by)
SHUFFLE_FUNCTION(simd_shuffle_rotate_down, simd_read, ROTATE_DOWN, (emu::lane() + by) & 31)
SHUFFLE_FUNCTION(simd_shuffle_rotate_up, simd_read, ROTATE_UP, (emu::lane() - by) & 31)
SHUFFLE_FUNCTION(quad_shuffle_xor, simd_read, QUAD_XOR, emu::lane() ^ (by & 3))
#undef SHUFFLE_FUNCTION

template <class T>
inline T simd_shuffle_and_fill_up(T value, T filling, ushort by, CALL_LINE) {
  int source = emu::lane() - by;
  T shifted = simd_read(value, source & 31, line, FILL_UP);
  T filled = simd_read(filling, source & 31, line, FILL_UP_WITH);
  return source < 0 ? filled : shifted;
}

template <class T>
inline T simd_prefix_exclusive_sum(T value, CALL_LINE) {
  uint active;
  const emu::Slot* slots = emu::exchange(&value, sizeof(T), line, EXCLUSIVE, &active);
  T sum = T(0);
  for (int i = 0; i < emu::lane(); ++i)
    if (active >> i & 1) sum = T(sum + slot_value<T>(slots, i));
  return sum;
}
template <class T>
inline T simd_prefix_inclusive_sum(T value, CALL_LINE) {
  return T(simd_prefix_exclusive_sum(value, line) + value);
}

template <class T>
inline T simd_broadcast_first(T value, CALL_LINE) {
  uint active;
  const emu::Slot* slots = emu::exchange(&value, sizeof(T), line, FIRST, &active);
  return slot_value<T>(slots, __builtin_ctz(active));
}
inline bool simd_is_first(CALL_LINE) {
  int nothing = 0;
  uint active;
  emu::exchange(&nothing, sizeof nothing, line, IS_FIRST, &active);
  return emu::lane() == int(__builtin_ctz(active));
}

template <class T>
inline T quad_sum(T value, CALL_LINE) {
  uint active;
  const emu::Slot* slots = emu::exchange(&value, sizeof(T), line, QUAD_SUM, &active);
  int quad = emu::lane() & ~3;
  auto of = [&](int i) { return slot_value<T>(slots, quad + i); };
  return T(T(of(0) + of(2)) + T(of(1) + of(3)));
}
template <class T>
inline T quad_max(T value, CALL_LINE) {
  uint active;
  const emu::Slot* slots = emu::exchange(&value, sizeof(T), line, QUAD_MAX, &active);
  T most = slot_value<T>(slots, emu::lane() & ~3);
  for (int i = 1; i < 4; ++i) most = max(most, slot_value<T>(slots, (emu::lane() & ~3) + i));
  return most;
}

}  // namespace metal
