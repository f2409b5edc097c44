// One trajectory in flight: what is known of it besides its state, and what is written down of it.
#pragma once

#include <stdint.h>

#include <vector>

#include "cpu/loop/fixed_point.h"
#include "cpu/loop/selection.h"

namespace eqr::cpu {

class Trajectory {
 public:
  explicit Trajectory(const FixedPoint&);

  static int64_t bytes(const FixedPoint&);

  void begin(int64_t number);
  // From now on cell s is the puzzle's cells[s], int64 [S]. Streak and score begin anew.
  void turn(const int64_t* cells);
  // Takes in an outer step, and decides whether it was the last. Records the step in `residuals`.
  void advance(const StepOutput&);
  // A sibling has won the race.
  void lose() { status_ = kCancelled; }
  // The caller wants no more: the trajectory keeps the answer that it has.
  void cancel();
  // Writes the checkpoint that has just been reached; once ended, the end and all later checkpoints.
  void record();
  // Writes the answer of now to where that of the end will be.
  void answer() const;

  bool going() const { return status_ == kGoing; }
  Status status() const { return status_; }
  int64_t number() const { return number_; }
  int64_t puzzle() const { return number_ / p_.breadth; }
  int64_t restart() const { return number_ % p_.breadth; }
  int64_t steps() const { return steps_; }
  Ended ended() const;  // after `record` or `answer`; without states

 private:
  float score() const;
  void write(const Records&) const;

  const FixedPoint& p_;
  int64_t number_ = 0, steps_ = 0, streak_ = 0;
  int64_t turned_ = 0;              // outer steps before the last turn
  const int64_t* cells_ = nullptr;  // [S], since then; null: as the puzzle has them
  int64_t checkpoint_ = 0;          // the next one
  Status status_ = kGoing;
  float residual_ = 0, q_halt_ = 0;
  std::vector<float> logits_;   // [S, V] of the puzzle's cells, the last finite ones; zero before
  std::vector<float> changes_;  // [window], a ring of the last changes of the logits
};

}  // namespace eqr::cpu
