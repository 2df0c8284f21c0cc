// Threads that take turns on one OS thread: each has a stack, and one leaves for another at a call.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace emu {

// Saves the registers that a call keeps and the stack pointer in *from, and goes on from `to`.
extern "C" void switch_stack(void** from, void* to);

static const size_t STACK = 128 * 1024;

#if defined(__x86_64__)
asm(R"(
.text
.local switch_stack
.type switch_stack,@function
switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

// A stack on which `switch_stack` finds six registers and returns into `start`.
static void* fresh_stack(char* memory, void (*start)()) {
  void** top = (void**)(((uintptr_t)memory + STACK) & ~(uintptr_t)15);
  *--top = nullptr;
  *--top = (void*)start;
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}
#elif defined(__aarch64__)
asm(R"(
.text
.local switch_stack
.type switch_stack,%function
switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");

static void* fresh_stack(char* memory, void (*start)()) {
  char* top = (char*)(((uintptr_t)memory + STACK) & ~(uintptr_t)15) - 160;
  memset(top, 0, 160);
  *(void**)(top + 88) = (void*)start;  // x30, where `ret` goes
  return top;
}
#endif

}  // namespace emu
