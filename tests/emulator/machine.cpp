// The emulated GPU: how a grid, its threadgroups, simdgroups and threads run.
//
// One OS thread does it all. Threadgroups run one after the other. The threads of a threadgroup
// are *fibers*: each has a stack of its own, and `switch_stack` leaves one for another. A thread
// runs until it has to wait for others - at a barrier or at a simdgroup operation - or returns.
// So a barrier is no more than a place where the scheduler makes everybody stop, and all that can
// go wrong between two of them is decided by the order in which threads run: the *schedule*.
//
// Read from the bottom: run, run_threadgroup, advance.
#include "machine.h"

#include "fiber.h"

#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <utility>
#include <vector>

namespace emu {

// ----------------------------------------------------------------------------- who is where

enum class Wait : unsigned char { no, simd_operation, simd_barrier, group_barrier, returned };

struct Thread {
  void* stack_pointer;
  char* stack;
  Wait waits;
  int line;    // where it waits
  int parity;  // which of its simdgroup's two exchanges is its next one
};

// Two exchanges are kept, because a fast lane may begin the next while a slow one reads the last.
struct Simdgroup {
  Slot slots[2][LANES];
  uint32_t active[2];    // lanes that took part
  int line[2], operation[2];
  uint32_t arrived;      // lanes waiting in the exchange under way
  uint32_t alive;        // lanes that have not returned
};

struct Variable {
  const void* key;
  size_t offset;
};

struct Machine {
  Launch* launch;
  std::vector<Thread> threads;
  std::vector<Simdgroup> simdgroups;
  Size group, group_size;
  int num_threads = 0, num_alive = 0, current = 0;
  void* scheduler = nullptr;  // its stack pointer while a thread runs
  bool failed = false;
  uint64_t random = 0;
  char* memory = nullptr;     // the threadgroup's
  size_t memory_used = 0;
  std::vector<Variable> variables;
  sigjmp_buf out;             // of a bad memory access
};

static Machine* machine = nullptr;
static const size_t MEMORY = 1 << 20;  // far more than Metal's 32 KB, so that excess is counted

Place place() {
  return {machine->launch, machine->group, machine->group_size, (uint32_t)machine->current};
}

int thread_number() { return machine->current; }

static void leave_thread() {
  switch_stack(&machine->threads[machine->current].stack_pointer, machine->scheduler);
}

template <class... Values>
static void report(const char* format, Values... values) {
  machine->failed = true;
  snprintf(machine->launch->error, sizeof machine->launch->error, format, values...);
}

void fail(const char* message, int line) {
  const Size& g = machine->group;
  report("%s (line %d, threadgroup %u,%u,%u, thread %d)", message, line, g.x, g.y, g.z,
         machine->current);
  leave_thread();
  abort();
}

// ------------------------------------------------------------------- what threads wait for

// All lanes of the exchange are there: they may read the slots and run on.
static void complete_exchange(int simdgroup, int parity) {
  Simdgroup& group = machine->simdgroups[simdgroup];
  group.active[parity] = group.arrived;
  group.arrived = 0;
  int first = simdgroup * LANES;
  for (int i = first; i < first + LANES && i < machine->num_threads; ++i)
    if (machine->threads[i].waits == Wait::simd_operation) machine->threads[i].waits = Wait::no;
}

const Slot* exchange(const void* value, size_t size, int line, int operation, uint32_t* active) {
  Thread& me = machine->threads[machine->current];
  int number = machine->current / LANES, parity = me.parity;
  Simdgroup& group = machine->simdgroups[number];
  memcpy(group.slots[parity][lane()].bytes, value, size);
  if (!group.arrived) {
    group.line[parity] = line;
    group.operation[parity] = operation;
  } else if (group.line[parity] != line || group.operation[parity] != operation) {
    char text[128];
    snprintf(text, sizeof text,
             "divergent simdgroup operation: lanes of one simdgroup are at lines %d and %d",
             group.line[parity], line);
    fail(text, line);
  }
  group.arrived |= 1u << lane();
  me.parity ^= 1;
  me.line = line;
  if (group.arrived == group.alive) {
    complete_exchange(number, parity);
  } else {
    me.waits = Wait::simd_operation;
    leave_thread();
  }
  *active = group.active[parity];
  return group.slots[parity];
}

void barrier(int line, bool simdgroup_only) {
  Thread& me = machine->threads[machine->current];
  me.line = line;
  me.waits = simdgroup_only ? Wait::simd_barrier : Wait::group_barrier;
  leave_thread();
}

void* threadgroup_variable(const void* key, size_t size, size_t alignment) {
  for (const Variable& variable : machine->variables)
    if (variable.key == key) return machine->memory + variable.offset;
  size_t offset = (machine->memory_used + alignment - 1) / alignment * alignment;
  if (offset + size > MEMORY) fail("threadgroup memory exceeds 1 MiB", 0);
  machine->variables.push_back({key, offset});
  machine->memory_used = offset + size;
  if (machine->memory_used > machine->launch->threadgroup_bytes)
    machine->launch->threadgroup_bytes = machine->memory_used;
  return machine->memory + offset;
}

// ------------------------------------------------------------------------------- scheduling

static uint32_t random_number() {
  machine->random = machine->random * 6364136223846793005ull + 1442695040888963407ull;
  return machine->random >> 33;
}

static void thread_main() {
  machine->launch->entry(machine->launch->arguments);
  machine->threads[machine->current].waits = Wait::returned;
  leave_thread();
  abort();
}

// A lane that has returned takes no part any more; the others may have waited for it alone.
static void retire(int thread) {
  machine->num_alive--;
  int number = thread / LANES, first = number * LANES;
  Simdgroup& group = machine->simdgroups[number];
  group.alive &= ~(1u << thread % LANES);
  if (!group.alive || group.arrived != group.alive) return;
  for (int i = first; i < first + LANES && i < machine->num_threads; ++i)
    if (machine->threads[i].waits == Wait::simd_operation)
      return complete_exchange(number, machine->threads[i].parity ^ 1);
}

// Opens the simdgroup's own barrier if all its lanes wait there.
static bool open_simd_barrier(int first, int end) {
  int waiting = 0, alive = 0;
  for (int i = first; i < end; ++i) {
    waiting += machine->threads[i].waits == Wait::simd_barrier;
    alive += machine->threads[i].waits != Wait::returned;
  }
  if (!waiting || waiting != alive) return false;
  for (int i = first; i < end; ++i)
    if (machine->threads[i].waits == Wait::simd_barrier) machine->threads[i].waits = Wait::no;
  return true;
}

// Lets every lane of a simdgroup that need not wait run once. Returns whether any did.
static bool advance(int simdgroup) {
  int first = simdgroup * LANES, end = first + LANES;
  if (end > machine->num_threads) end = machine->num_threads;
  int width = end - first, order[LANES], schedule = machine->launch->schedule;
  for (int i = 0; i < width; ++i) order[i] = schedule == 1 ? width - 1 - i : i;
  if (schedule >= 2)
    for (int i = width - 1; i > 0; --i) std::swap(order[i], order[random_number() % (i + 1)]);
  bool any = false;
  for (int i = 0; i < width; ++i) {
    machine->current = first + order[i];
    Thread& thread = machine->threads[machine->current];
    if (thread.waits != Wait::no) continue;
    any = true;
    switch_stack(&machine->scheduler, thread.stack_pointer);
    if (machine->failed) return false;
    if (thread.waits == Wait::returned) retire(first + order[i]);
  }
  return open_simd_barrier(first, end) || any;
}

// Opens the threadgroup's barrier if all threads wait there; it must be the same one for all.
static bool open_group_barrier() {
  int waiting = 0, line = -1;
  for (int i = 0; i < machine->num_threads; ++i) {
    const Thread& thread = machine->threads[i];
    if (thread.waits != Wait::group_barrier) continue;
    waiting++;
    if (line < 0) line = thread.line;
    if (thread.line != line) {
      report("threads of one threadgroup wait at different barriers (lines %d and %d)", line,
             thread.line);
      return false;
    }
  }
  if (!waiting || waiting != machine->num_alive) return false;
  if (machine->num_alive != machine->num_threads) {
    report("threadgroup_barrier at line %d, but %d of %d threads have returned", line,
           machine->num_threads - machine->num_alive, machine->num_threads);
    return false;
  }
  for (int i = 0; i < machine->num_threads; ++i) machine->threads[i].waits = Wait::no;
  return true;
}

// Lets each simdgroup run until it waits for others. Schedules 0 and 1 let one run as far as it
// can before the next starts, first to last or last to first: what a missing barrier would have
// kept apart then meets in one of the two. The others interleave simdgroups at random.
static bool advance_all() {
  int count = machine->simdgroups.size();
  bool any = false;
  if (machine->launch->schedule >= 2)
    for (int idle = 0; idle < 2 * count && !machine->failed;) {
      int number = random_number() % count;
      bool ran = false;
      for (int burst = 1 + random_number() % 16; burst && advance(number); --burst) ran = true;
      any |= ran;
      idle = ran ? 0 : idle + 1;
    }
  for (int i = 0; i < count && !machine->failed; ++i) {
    int number = machine->launch->schedule == 1 ? count - 1 - i : i;
    while (advance(number)) any = true;
  }
  return any;
}

static void start_threadgroup() {
  machine->num_threads = machine->group_size.x * machine->group_size.y * machine->group_size.z;
  machine->num_alive = machine->num_threads;
  machine->variables.clear();
  machine->memory_used = 0;
  size_t dirty = machine->launch->threadgroup_bytes + 4096;
  memset(machine->memory, machine->launch->poison, dirty < MEMORY ? dirty : MEMORY);
  machine->simdgroups.assign((machine->num_threads + LANES - 1) / LANES, Simdgroup());
  for (int i = 0; i < machine->num_threads; ++i) {
    Thread& thread = machine->threads[i];
    thread.stack_pointer = fresh_stack(thread.stack, thread_main);
    thread.waits = Wait::no;
    thread.parity = 0;
    machine->simdgroups[i / LANES].alive |= 1u << i % LANES;
  }
}

static void run_threadgroup() {
  start_threadgroup();
  while (machine->num_alive && !machine->failed) {
    bool any = advance_all();
    if (machine->failed || open_group_barrier() || any) continue;
    if (machine->failed || !machine->num_alive) return;
    int at_barrier = 0, at_operation = 0;
    for (int i = 0; i < machine->num_threads; ++i) {
      const Thread& thread = machine->threads[i];
      if (thread.waits == Wait::group_barrier) at_barrier = thread.line;
      if (thread.waits == Wait::simd_operation || thread.waits == Wait::simd_barrier)
        at_operation = thread.line;
    }
    report("divergent control flow: some threads wait at the barrier of line %d, others at the "
           "simdgroup operation of line %d", at_barrier, at_operation);
  }
}

// ----------------------------------------------------------------------------------- launch

static void on_signal(int signal_number, siginfo_t* info, void*) {
  const Size& g = machine->group;
  report(signal_number == SIGILL ? "undefined behaviour at %p, threadgroup %u,%u,%u, thread %d"
                                 : "BAD ACCESS %p threadgroup %u,%u,%u, thread %d",
         info->si_addr, g.x, g.y, g.z, machine->current);
  siglongjmp(machine->out, 1);
}

static void run_grid(const uint32_t* count) {
  Launch* launch = machine->launch;
  uint64_t total = (uint64_t)count[0] * count[1] * count[2];
  for (uint64_t i = 0; i < total && !machine->failed; ++i) {
    uint64_t number = launch->schedule == 1 ? total - 1 - i : i;
    uint32_t at[3] = {(uint32_t)(number % count[0]), (uint32_t)(number / count[0] % count[1]),
                      (uint32_t)(number / count[0] / count[1])};
    uint32_t size[3];
    for (int d = 0; d < 3; ++d) {
      uint32_t rest = launch->grid[d] - at[d] * launch->threadgroup[d];
      size[d] = rest < launch->threadgroup[d] ? rest : launch->threadgroup[d];
    }
    machine->group = {at[0], at[1], at[2]};
    machine->group_size = {size[0], size[1], size[2]};
    run_threadgroup();
  }
}

int run(Launch* launch) {
  uint32_t count[3], most = 1;
  for (int d = 0; d < 3; ++d) {  // a threadgroup is never larger than the grid
    if (launch->threadgroup[d] > launch->grid[d]) launch->threadgroup[d] = launch->grid[d];
    count[d] = (launch->grid[d] + launch->threadgroup[d] - 1) / launch->threadgroup[d];
    most *= launch->threadgroup[d];
  }
  Machine it;
  it.launch = launch;
  it.random = 0x9e3779b97f4a7c15ull * (launch->schedule + 1);
  it.threads.resize(most);
  char* stacks = (char*)mmap(nullptr, STACK * most, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (uint32_t i = 0; i < most; ++i) it.threads[i].stack = stacks + STACK * i;
  it.memory = (char*)aligned_alloc(64, MEMORY);
  machine = &it;

  std::vector<char> signal_stack(65536);
  stack_t mine{}, before{};
  mine.ss_sp = signal_stack.data();
  mine.ss_size = signal_stack.size();
  sigaltstack(&mine, &before);
  struct sigaction action{}, old[3];
  const int signals[3] = {SIGSEGV, SIGBUS, SIGILL};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &action, &old[i]);
  if (!sigsetjmp(it.out, 1)) run_grid(count);
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &old[i], nullptr);
  sigaltstack(&before, nullptr);

  munmap(stacks, STACK * most);
  free(it.memory);
  machine = nullptr;
  return it.failed;
}

}  // namespace emu
