// The fixed-point loop: every trajectory of every puzzle to its end, each stopping when it has settled, on however many
// threads come. S tokens, V vocabulary, N puzzles x B restarts = T trajectories; trajectory t is restart t % B of
// puzzle t / B.
#pragma once

#include <stdint.h>

#include <memory>

#include "common/run_rules.h"
#include "cpu/operator.h"

namespace eqr::cpu {

struct Ended;

struct FixedPoint : RunRules {
  Engine engine;
  int64_t puzzles;
  const int64_t* tokens;       // [N, S]
  const int64_t* ids;          // [N], key the random stream
  const int64_t* checkpoints;  // [C] ascending, each in 1..depth
  int64_t checkpoint_count;
  int64_t slots;     // trajectories in flight at most
  Records end;       // as each ended
  Records* at;       // [C]: at each checkpoint, kGoing where not at its end; those that ended earlier as they ended
  float* residuals;  // [T, depth], written up to each one's end, or null
  int64_t* winner;   // [N], the restart that the select rule chooses
  float* logits;     // [N, S, V], the winner's
  float *z_H = nullptr, *z_L = nullptr;  // [N, S, d], the winner's state, or null; zero where it never ran
  // Where trajectories start: states [T, S, d], and rng [T, 4] as in StepInput; or null, and each draws its own.
  const float *start_H = nullptr, *start_L = nullptr;
  const int64_t* start_rng = nullptr;
  // Turns: after every `turn_every` outer steps a trajectory's cells move, at the v-th turn to number v % V of its
  // puzzle's [N, V, S]: the puzzle's cell that each cell shows. Its state moves with them, and what is recorded is of
  // the puzzle's own cells. Null: they stay. Not with z_H and z_L.
  const int64_t* turn_cells = nullptr;
  int64_t turn_every = 0, turn_count = 0;
  int64_t state_size = 0;  // S * d, where any of these is not null and in an open run
  // Called by any of the threads when a trajectory has ended, or null.
  void (*on_end)(void* context, const Ended&) = nullptr;
  void* on_end_context = nullptr;
  // [3], shared with other threads, read and written atomically: [0] set non-zero to cancel; [1] trajectories finished;
  // [2] outer steps spent. The caller sets them to zero.
  int64_t* control;

  FixedPoint() = default;
  explicit FixedPoint(const RunRules& rules) : RunRules(rules) {}
};

// A trajectory's results do not depend on threads, slots or company, except for when a sibling in a race, or one that
// the caller cancels, is stopped. The engine must not throw.
class FixedPointRun {
 public:
  // `workers` >= 1: threads that may call `work`. Allocates min(workers, slots, T) workspaces.
  FixedPointRun(const FixedPoint&, int workers);
  ~FixedPointRun();
  FixedPointRun(const FixedPointRun&) = delete;
  FixedPointRun& operator=(const FixedPointRun&) = delete;

  // Each thread of the pool calls it once; it returns when all trajectories have ended. Fewer than `workers` may come,
  // and all may be one after another on one thread. `poll` comes from the one thread that may be interrupted (null from
  // the others); it is called between outer steps and while that thread waits, every 20 ms at most. When it returns
  // false, what is left is cancelled at the next outer step.
  void work(bool (*poll)()) noexcept;

  // After every `work` has returned. Writes what can only be known at the end (the winners of a vote), and rethrows
  // what a worker threw.
  void finish();

  static int64_t bytes_per_trajectory(const FixedPoint&);

 private:
  class State;
  std::unique_ptr<State> state_;
};

}  // namespace eqr::cpu
