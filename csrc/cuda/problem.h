// A fixed-point run as the kernels take it, by value: every pointer but `control` is to the device's memory.
// N puzzles x B restarts = T trajectories; trajectory t is restart t % B of puzzle t / B. S tokens, V vocabulary.
#pragma once

#include <stdint.h>

#include "common/run_rules.h"
#include "cuda/packed.h"

namespace eqr::cuda {

constexpr int kMostCheckpoints = 64;

struct Control;  // of trajectory.h

// What all CTAs share; zero before a launch, but `best`.
struct Counters {
  uint64_t queue, finished, spent;  // trajectories taken, trajectories ended, outer steps
  uint32_t arrived;                 // at the barriers of the grid (latency kernel)
  uint32_t unused;
};

struct Problem : RunRules {
  Shape shape;
  Layout layout;
  const char* packed;  // weights, see packed.h
  int64_t puzzles;
  const int64_t* tokens;  // [N, S]
  const int64_t* ids;     // [N], key the random stream
  int32_t checkpoint_count;
  int32_t checkpoints[kMostCheckpoints];  // rising, each in 1..depth
  Records end;                            // as each ended
  Records at;        // [C, T]: at each checkpoint, kGoing where not at its end; those that ended earlier as they ended
  float* logits;     // [T, S, V], as each ended
  float* residuals;  // [T, depth], written up to each one's end, or null
  Counters* counters;
  uint64_t* best;  // [N]: steps << 32 | restart of the first to settle, all ones before; null but in a race
  char* slots;     // states of the trajectories in flight: a CTA's each, or where some are parked, one's own
  int64_t slot_bytes;
  char* work;  // scratch of the latency kernel
  // Which trajectories: the first `count`, each from its start to its end; or with `parked`, those of `rows`, each from
  // where the launch before has left it, for at most `quantum` outer steps.
  int64_t count;
  const int64_t* rows;  // [count]
  int64_t quantum;
  Control* parked;  // [T], zeros where none has begun
  // [3], of the host: [0] non-zero cancels what is left; [1] trajectories ended; [2] outer steps spent. May be null.
  int64_t* control;

  Problem() = default;
  explicit Problem(const RunRules& rules) : RunRules(rules) {}
};

}  // namespace eqr::cuda
