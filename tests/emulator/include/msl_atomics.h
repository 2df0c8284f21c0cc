// Atomics. One OS thread runs everything, so plain reads and writes are atomic already.
#pragma once
#include "msl_types.h"

namespace metal {

enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;

template <class T>
inline T atomic_load_explicit(const volatile atomic<T>* object, memory_order) {
  return const_cast<const atomic<T>*>(object)->value;
}

#define ATOMIC(name, expression)                                                                  \
  template <class T>                                                                              \
  inline T atomic_##name##_explicit(volatile atomic<T>* object, std::type_identity_t<T> operand, \
                                    memory_order) {                                               \
    T& stored = const_cast<atomic<T>*>(object)->value;                                            \
    const T old = stored;                                                                         \
    stored = T(expression);                                                                       \
    return old;                                                                                   \
  }
ATOMIC(store, operand)
ATOMIC(exchange, operand)
ATOMIC(fetch_add, old + operand)
ATOMIC(fetch_sub, old - operand)
ATOMIC(fetch_min, old < operand ? old : operand)
ATOMIC(fetch_max, old > operand ? old : operand)
ATOMIC(fetch_or, old | operand)
ATOMIC(fetch_and, old& operand)
ATOMIC(fetch_xor, old ^ operand)
#undef ATOMIC

template <class T>
inline bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* object, T* expected,
                                                  std::type_identity_t<T> desired, memory_order,
                                                  memory_order) {
  T& stored = const_cast<atomic<T>*>(object)->value;
  const T old = stored;
  const bool same = memcmp(&old, expected, sizeof(T)) == 0;
  if (same) stored = desired;
  *expected = old;
  return same;
}

}  // namespace metal
