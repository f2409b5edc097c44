// Which of a puzzle's trajectories is its answer, decided while they end, by the rules of common/run_rules.h.
#pragma once

#include <stdint.h>

#include <atomic>
#include <map>
#include <mutex>
#include <vector>

#include "cpu/loop/fixed_point.h"

namespace eqr::cpu {

// A trajectory that has ended.
struct Ended {
  int64_t puzzle = 0, restart = 0;
  Status status = kGoing;
  float residual = 0, score = 0, q_halt = 0;
  int64_t steps = 0;
  const int64_t* preds = nullptr;              // [S]
  int64_t tokens = 0;                          // S
  const float* logits = nullptr;               // [S, V]
  const float *z_H = nullptr, *z_L = nullptr;  // [S, d], where states are kept
};

// Keeps the logits, and where these are wanted the states, of the best trajectory of each puzzle; under `vote`, of the
// best of each distinct answer.
class Selection {
 public:
  explicit Selection(const FixedPoint&);

  void offer(const Ended&);  // from any thread
  void finish();             // when all have been offered

 private:
  struct Answer {
    int64_t votes = 0;  // of trajectories that neither diverged nor were cancelled
    WinnerKey best{};
    std::vector<float> logits, z_H, z_L;  // [S, V], [S, d]; empty until the first offer
  };
  struct Puzzle {
    std::mutex mutex;
    WinnerKey best{};
    bool offered = false;
    std::map<std::vector<int64_t>, Answer> answers;
  };

  void choose(int64_t puzzle, int64_t restart, const float* logits, const float* z_H, const float* z_L);

  const FixedPoint& p_;
  std::vector<Puzzle> puzzles_;
};

// A race to settle in the fewest steps, ties to the lower restart.
class Race {
 public:
  explicit Race(int64_t puzzles);

  void settled(int64_t puzzle, int64_t restart, int64_t steps);
  // Settling at the step after `steps` would already be too late. Once true it stays so.
  bool cannot_win(int64_t puzzle, int64_t restart, int64_t steps) const;

 private:
  std::vector<std::atomic<uint64_t>> best_;  // places, only ever lowered
};

}  // namespace eqr::cpu
