// The threads that compute one trajectory together, and where they wait for each other.
#pragma once

#include <stdint.h>

namespace eqr::cpu {

// Zero-initialised. All `size` members call `wait`; none returns before the last has called. What each wrote before is
// then visible to all. Reusable at once. Waiters spin, then yield their core.
struct alignas(64) Barrier {
  int32_t arrived;
  int32_t phase;
  void wait(int size);
};

// This thread's place: member `rank` of `size`. A lone thread has size 1, for which `sync` does nothing.
// Always inlined: kernels of several instruction sets include this, and a function of theirs that stood by itself would
// be merged with the others'.
struct Member {
  Barrier* barrier;
  int rank, size;

  [[gnu::always_inline]] void sync() const {
    if (size > 1) barrier->wait(size);
  }
  // The part of `items` that is this member's.
  [[gnu::always_inline]] int64_t begin(int64_t items) const { return items * rank / size; }
  [[gnu::always_inline]] int64_t end(int64_t items) const { return items * (rank + 1) / size; }
};

}  // namespace eqr::cpu
