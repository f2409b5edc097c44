// Fixed-point problems for the tests, their results, and an oracle that knows of no scheduling: it takes every
// trajectory to the full depth and reads what must be recorded off its history.
#pragma once

#include <stdint.h>

#include <vector>

#include "cpu/loop/fixed_point.h"
#include "mock_engine.h"

namespace eqr::test {

using eqr::Halt;
using eqr::Select;
using eqr::Status;

struct Table {
  std::vector<int64_t> preds;  // [T, S]
  std::vector<float> q_halt, residual, score;
  std::vector<int64_t> steps, status;

  Table(int64_t trajectories, int64_t tokens);
  Records records();
};

struct Problem {
  Mock mock;
  std::vector<int64_t> ids;  // [N]
  int64_t breadth = 3, depth = 40, seed = 7;
  Halt halt = Halt::residual;
  float tol = 0.02f;
  int64_t patience = 1;
  Select select = Select::residual;
  int64_t window = 3;
  float noise_scale = 0.001f;
  std::vector<int64_t> checkpoints;
  int64_t slots = 64;

  explicit Problem(int64_t puzzles = 4);
  int64_t puzzles() const { return int64_t(ids.size()); }
  int64_t trajectories() const { return puzzles() * breadth; }
  std::vector<int64_t> tokens() const;  // [N, S], a function of the ids
};

// A problem's buffers. It must outlive neither.
struct Result {
  Table end;
  std::vector<Table> at;
  std::vector<float> residuals;  // [T, depth]
  std::vector<int64_t> winner;
  std::vector<float> logits;  // [N, S, V]
  std::vector<int64_t> control;

  explicit Result(const Problem&);
  cpu::FixedPoint fixed_point(const Problem&);

 private:
  std::vector<int64_t> tokens_;
  std::vector<Records> at_records_;
};

// Runs it on `threads` threads, each of which calls `work` once: `poll` for the last one.
void run_on(const cpu::FixedPoint&, int threads, bool (*poll)() = nullptr);
Result solve(const Problem&, int threads);
// `result` may be watched while it runs.
void solve_into(Result&, const Problem&, int threads, bool (*poll)());

// Bitwise, NaN included.
bool same(const Table&, const Table&);
bool same(const Result&, const Result&);

bool close(float, float);  // to rounding; NaN to NaN

class Oracle {
 public:
  explicit Oracle(const Problem&);

  // As it is after `depth` steps at most, or as it ended. Going: kGoing, or kMaxDepth at the problem's depth.
  void record(int64_t trajectory, int64_t depth, Table* to) const;
  Table table(int64_t depth) const;
  std::vector<int64_t> winners(const Table&) const;                    // [N]
  std::vector<float> logits(int64_t trajectory, int64_t steps) const;  // the last finite ones, [S, V]
  float residual(int64_t trajectory, int64_t step) const { return history_[trajectory][step].residual; }

 private:
  struct Step {
    std::vector<float> logits;
    float residual, q_halt;
    bool finite;
  };

  int64_t last_step(const std::vector<Step>&, int64_t depth, Status*) const;

  const Problem& p_;
  std::vector<std::vector<Step>> history_;  // [T][depth]
};

// Compares everything with the oracle, for problems in which nothing is cancelled; scores to rounding.
void check_against_oracle(const Problem&, const Oracle&, const Result&, const char* what);

}  // namespace eqr::test
