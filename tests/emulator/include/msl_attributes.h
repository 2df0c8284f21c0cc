// What `[[thread_position_in_grid]]` and its kin give the current thread.
#pragma once
#include "machine.h"
#include "msl_types.h"

namespace attribute {

using metal::uint3;

inline uint3 of(emu::Size size) { return uint3(size.x, size.y, size.z); }
inline uint3 of(const uint32_t (&size)[3]) { return uint3(size[0], size[1], size[2]); }

inline uint3 thread_position_in_threadgroup() {
  const emu::Place here = emu::place();
  const uint x = here.group_size.x, y = here.group_size.y;
  return uint3(here.thread % x, here.thread / x % y, here.thread / x / y);
}
inline uint3 threadgroup_position_in_grid() { return of(emu::place().group); }
inline uint3 thread_position_in_grid() {
  return threadgroup_position_in_grid() * of(emu::place().launch->threadgroup) +
         thread_position_in_threadgroup();
}
inline uint3 threads_per_threadgroup() { return of(emu::place().group_size); }
inline uint3 dispatch_threads_per_threadgroup() { return of(emu::place().launch->threadgroup); }
inline uint3 threads_per_grid() { return of(emu::place().launch->grid); }
inline uint3 grid_size() { return threads_per_grid(); }
inline uint3 grid_origin() { return uint3(0u); }
inline uint3 threadgroups_per_grid() {
  const uint3 full = dispatch_threads_per_threadgroup();
  return (threads_per_grid() + full - uint3(1u)) / full;
}

inline uint thread_index_in_threadgroup() { return emu::thread_number(); }
inline uint thread_index_in_simdgroup() { return emu::lane(); }
inline uint simdgroup_index_in_threadgroup() { return emu::thread_number() / emu::LANES; }
inline uint thread_index_in_quadgroup() { return emu::thread_number() % 4; }
inline uint quadgroup_index_in_threadgroup() { return emu::thread_number() / 4; }
inline uint threads_per_simdgroup() { return emu::LANES; }
inline uint thread_execution_width() { return emu::LANES; }

inline uint count(uint3 size, uint each) { return (size.x * size.y * size.z + each - 1) / each; }
inline uint simdgroups_per_threadgroup() { return count(threads_per_threadgroup(), emu::LANES); }
inline uint quadgroups_per_threadgroup() { return count(threads_per_threadgroup(), 4); }
inline uint dispatch_simdgroups_per_threadgroup() {
  return count(dispatch_threads_per_threadgroup(), emu::LANES);
}
inline uint dispatch_quadgroups_per_threadgroup() {
  return count(dispatch_threads_per_threadgroup(), 4);
}

}  // namespace attribute
