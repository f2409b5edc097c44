// Stacks to switch between on one thread of the host, by a few instructions and no system call.
#pragma once

#include <cstddef>

namespace eqr::emu {

// Runs `entry` on a stack of its own, in pieces: `enter` goes on with it, `leave` (called on that stack) comes back.
class Fiber {
 public:
  Fiber();  // takes a stack from a pool
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void start(void (*entry)(void*), void* argument);  // `entry` must never return: it leaves for good
  void enter();
  void leave();

 private:
  static void first(Fiber* fiber);

  int stack_;
  void* place_ = nullptr;
  void* fake_ = nullptr;  // the address sanitizer's
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
};

}  // namespace eqr::emu
