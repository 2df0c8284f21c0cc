// What a running kernel sees of the emulated GPU. `machine.cpp` implements it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emu {

constexpr int LANES = 32;  // threads of a simdgroup

// What one lane shows to the others of its simdgroup in one operation.
struct Slot {
  alignas(16) unsigned char bytes[64];
};

// A kernel launch, filled in by Python (machine.py has the same layout).
struct Launch {
  void (*entry)(void*);        // runs the kernel's body for the current thread
  void* arguments;             // of `entry`: the buffers' addresses
  uint32_t grid[3];            // threads, as dispatchThreads counts them
  uint32_t threadgroup[3];     // threads of a full threadgroup
  int schedule;                // 0: first to last, 1: last to first, 2 and up: random, by seed
  int poison;                  // byte that threadgroup memory holds at the start
  size_t threadgroup_bytes;    // out: the most threadgroup memory a threadgroup used
  char error[512];             // out: what went wrong; empty if nothing did
};

struct Size {
  uint32_t x, y, z;
};

// Where the current thread stands.
struct Place {
  const Launch* launch;
  Size group;                  // its threadgroup's place in the grid of threadgroups
  Size group_size;             // threads of its threadgroup, smaller at a ragged edge
  uint32_t thread;             // its number in the threadgroup
};
Place place();
int thread_number();           // the same as place().thread, for those in a hurry
inline int lane() { return thread_number() % LANES; }

// Shows `value` to the simdgroup and waits until every lane that has not returned did the same.
// Returns the 32 slots; bit i of `active` is set if lane i took part. `operation` and `line` must
// be the same in all lanes.
const Slot* exchange(const void* value, size_t size, int line, int operation, uint32_t* active);

// Waits for the threads of the threadgroup, or of the simdgroup only.
void barrier(int line, bool simdgroup_only);

// The current threadgroup's variable that is known by `key`.
void* threadgroup_variable(const void* key, size_t size, size_t alignment);

// Ends the launch with an error.
[[noreturn]] void fail(const char* message, int line);

int run(Launch* launch);

}  // namespace emu
