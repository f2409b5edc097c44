// Trajectories that have ended, on their way from the threads of a run to the thread that called it.
#pragma once

#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/loop/selection.h"

namespace eqr {

struct EndedTrajectory {
  int64_t puzzle, restart, status, steps;
  float residual, score, q_halt;
  std::vector<int64_t> preds;  // [S]
};

inline EndedTrajectory ended_trajectory(const cpu::Ended& t) {
  return {t.puzzle, t.restart, t.status, t.steps, t.residual, t.score, t.q_halt, {t.preds, t.preds + t.tokens}};
}

class EndedQueue {
 public:
  void push(EndedTrajectory t) {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(t));
  }
  std::vector<EndedTrajectory> take() {
    const std::lock_guard lock(mutex_);
    return std::exchange(queue_, {});
  }

 private:
  std::mutex mutex_;
  std::vector<EndedTrajectory> queue_;
};

// Of this thread, null where nobody wants to know.
inline thread_local EndedQueue* ended_queue = nullptr;

}  // namespace eqr
