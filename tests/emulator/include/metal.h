// All of the emulated Metal standard library; compiled once and used by every kernel.
#pragma once
#include "msl_atomics.h"
#include "msl_attributes.h"
#include "msl_matrix.h"

namespace emu {

// A `threadgroup` variable: the same memory for all threads of the threadgroup.
template <class T>
inline T& threadgroup_variable(const void* key) {
  const size_t alignment = alignof(T) < 16 ? 16 : alignof(T);
  return *reinterpret_cast<T*>(threadgroup_variable(key, sizeof(T), alignment));
}

}  // namespace emu

using namespace metal;
