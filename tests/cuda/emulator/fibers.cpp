#include "fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <deque>
#include <new>
#include <vector>

#if defined(__x86_64__)
#define EQR_SWITCH_BY_ASSEMBLY 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(EQR_SWITCH_BY_ASSEMBLY)
// Keeps what a function must keep, swaps the stack pointers and returns on the other stack.
extern "C" void eqr_emu_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.type eqr_emu_switch, @function
eqr_emu_switch:
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
.size eqr_emu_switch, . - eqr_emu_switch
)");
#endif

namespace eqr::emu {
namespace {

constexpr size_t kStack = 256 * 1024;  // of which only the pages in use take memory
constexpr size_t kGuard = 16 * 1024;   // so that running over ends in a fault

struct Stack {
  char* bottom;
#if !defined(EQR_SWITCH_BY_ASSEMBLY)
  ucontext_t context;
#endif
};

std::deque<Stack>& stacks() {
  static std::deque<Stack> all;
  return all;
}
std::vector<int>& unused() {
  static std::vector<int> indices;
  return indices;
}

// The scheduler's own place while a fiber runs.
#if defined(EQR_SWITCH_BY_ASSEMBLY)
void* outside;
#else
ucontext_t outside;
#endif
#if defined(__SANITIZE_ADDRESS__)
const void* outside_bottom;
size_t outside_size;
#endif

Fiber* starting;

}  // namespace

Fiber::Fiber() {
  if (unused().empty()) {
    void* memory =
        mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuard, PROT_NONE);
    Stack stack{};
    stack.bottom = static_cast<char*>(memory) + kGuard;
    stacks().push_back(stack);
    unused().push_back(int(stacks().size()) - 1);
  }
  stack_ = unused().back();
  unused().pop_back();
}

Fiber::~Fiber() { unused().push_back(stack_); }

void Fiber::first(Fiber* fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &outside_bottom, &outside_size);
#endif
  fiber->entry_(fiber->argument_);
  __builtin_trap();
}

void Fiber::start(void (*entry)(void*), void* argument) {
  entry_ = entry;
  argument_ = argument;
  fake_ = nullptr;
  Stack& stack = stacks()[stack_];
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(stack.bottom, kStack);  // frames that an earlier fiber never left
#endif
#if defined(EQR_SWITCH_BY_ASSEMBLY)
  // Tops at the same place in their pages would all fall in the same lines of the cache.
  char* top = stack.bottom + kStack - 64 * (stack_ * 5 % 61);
  auto* words = reinterpret_cast<uint64_t*>(top) - 16;
  void (*trampoline)() = [] { first(starting); };
  words[6] = reinterpret_cast<uint64_t>(trampoline);  // behind six registers; the stack is then aligned as by a call
  words[7] = 0;
  for (int i = 0; i < 6; ++i) words[i] = 0;
  place_ = words;
#else
  getcontext(&stack.context);
  stack.context.uc_stack.ss_sp = stack.bottom;
  stack.context.uc_stack.ss_size = kStack;
  stack.context.uc_link = nullptr;
  void (*trampoline)() = [] { first(starting); };
  makecontext(&stack.context, trampoline, 0);
#endif
}

void Fiber::enter() {
  starting = this;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stacks()[stack_].bottom, kStack);
#endif
#if defined(EQR_SWITCH_BY_ASSEMBLY)
  eqr_emu_switch(&outside, place_);
#else
  swapcontext(&outside, &stacks()[stack_].context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void Fiber::leave() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_, outside_bottom, outside_size);
#endif
#if defined(EQR_SWITCH_BY_ASSEMBLY)
  eqr_emu_switch(&place_, outside);
#else
  swapcontext(&stacks()[stack_].context, &outside);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_, &outside_bottom, &outside_size);
#endif
}

}  // namespace eqr::emu
