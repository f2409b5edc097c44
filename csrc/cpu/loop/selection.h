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
  int64_t puzzle, restart;
  Status status;
  float score, q_halt;
  int64_t steps;
  const int64_t* preds;  // [S]
  const float* logits;   // [S, V]
};

// Keeps the logits of the best trajectory of each puzzle; under `vote`, of the best of each distinct answer.
class Selection {
 public:
  // winner: [N]; logits: [N, S, V]
  Selection(Select, int64_t puzzles, int64_t tokens, int64_t vocabulary, int64_t* winner, float* logits);

  void offer(const Ended&);  // from any thread
  void finish();             // when all have been offered

 private:
  struct Answer {
    int64_t votes = 0;  // of trajectories that neither diverged nor were cancelled
    WinnerKey best{};
    std::vector<float> logits;  // [S, V]; empty until the first offer
  };
  struct Puzzle {
    std::mutex mutex;
    WinnerKey best{};
    bool offered = false;
    std::map<std::vector<int64_t>, Answer> answers;
  };

  const Select rule_;
  const int64_t tokens_, vocabulary_;
  int64_t* const winner_;
  float* const logits_;
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
