// A toy operator behind the interface of csrc/cpu/operator.h: it contracts, at a speed drawn for each trajectory, and
// splits its work over the team as a kernel does.
#pragma once

#include <stdint.h>

#include <atomic>

#include "cpu/operator.h"

namespace eqr::test {

enum class Fault { none, nan_residual, nan_logits, infinite_logits, nan_q };

struct Mock {
  int64_t tokens = 5, vocabulary = 4;  // at most kMockTokens, kMockVocabulary
  int answers = 1000;                  // attractors of a puzzle; a restart has one of them
  bool zero = false;                   // states that are zero and stay so
  int sleep_us = 0;                    // at most, at random, in every call
  int fixed_sleep_us = 0;              // in every call
  // What goes wrong in an outer step (numbered from 0), if anything.
  Fault (*fault)(int64_t id, int64_t restart, int64_t step) = nullptr;

  // Seen while it ran.
  mutable std::atomic<int64_t> shared_steps{0};  // outer steps by more than one thread
  mutable std::atomic<int> largest_team{0};
  mutable std::atomic<int64_t> workspaces{0};
  mutable std::atomic<int64_t> mistakes{0};  // calls that break the contract of operator.h

  cpu::Engine engine() const;
};

constexpr int64_t kMockTokens = 8, kMockVocabulary = 8, kMockState = 48;  // kMockState: of z_H, and of z_L

}  // namespace eqr::test
