// How a thread waits for another one that is about to be ready.
#pragma once

#include <sched.h>

namespace eqr::cpu {

// Spins, then yields the core: the thread that it waits for may need it.
class Backoff {
 public:
  void pause() {
    if (spins_ == kSpins) {
      sched_yield();
      return;
    }
    ++spins_;
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

 private:
  static constexpr int kSpins = 2000;  // some fifty microseconds
  int spins_ = 0;
};

}  // namespace eqr::cpu
