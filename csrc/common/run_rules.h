// The rules of a fixed-point run, and what is written down of its trajectories: the same on every device. The Python of
// them is eqr_kernels/run_rules.py and eqr_kernels/selection.py.
#pragma once

#include <stdint.h>

#include "common/inline.h"

namespace eqr {

enum class Halt : int32_t { none, residual, q, residual_and_q, residual_or_q };
enum class Select : int32_t { residual, vote, q, first };
enum Status : int64_t { kConverged = 0, kHalted, kMaxDepth, kCancelled, kDiverged, kGoing = -1 };

// Of each trajectory.
struct RunRules {
  int64_t seed;
  int64_t breadth, depth;  // breadth < 2^32, depth < 2^24
  Halt halt;
  float tol;
  int64_t patience;  // steps in a row at or below tol
  Select select;     // with `first`, siblings that cannot be the first to halt are cancelled
  int64_t window;    // differences of the logits in a score
  float noise_scale;
};

// Of T trajectories of S tokens.
struct Records {
  int64_t* preds;                    // [T, S]
  float *q_halt, *residual, *score;  // [T]
  int64_t *steps, *status;           // [T]
};

// ||z_k - z_{k-1}||^2 over ||z_k||^2, the residual's square. A state that is zero and stays so has settled: 0 / 0
// counts as 0.
EQR_INLINE float residual_sq(float change_sq, float size_sq) {
  return change_sq == 0 && size_sq == 0 ? 0.0f : change_sq / size_sq;
}

// After outer step number `steps`: `streak` steps in a row had a residual of at most tol.
EQR_INLINE Status status_after(const RunRules& r, bool finite, float q_halt, int64_t streak, int64_t steps) {
  if (!finite) return kDiverged;
  const bool low = streak >= r.patience, positive = q_halt > 0;
  const bool either = r.halt == Halt::residual_or_q, both = r.halt == Halt::residual_and_q;
  if (low && (r.halt == Halt::residual || either || (both && positive))) return kConverged;
  if (positive && (r.halt == Halt::q || either)) return kHalted;
  return steps == r.depth ? kMaxDepth : kGoing;
}

EQR_INLINE bool settled(int64_t status) { return status == kConverged || status == kHalted; }
EQR_INLINE bool votes(int64_t status) { return status != kDiverged && status != kCancelled; }

// A race: the lowest place among a puzzle's settled trajectories wins.
EQR_INLINE bool is_race(const RunRules& r) { return r.select == Select::first; }
EQR_INLINE uint64_t place_in_race(int64_t steps, int64_t restart) { return uint64_t(steps) << 32 | uint64_t(restart); }

// What a selection rule compares, least first. Holds no NaN.
struct WinnerKey {
  double rank, first, second;
  int64_t restart;
};

EQR_INLINE bool before(const WinnerKey& a, const WinnerKey& b) {
  if (a.rank != b.rank) return a.rank < b.rank;
  if (a.first != b.first) return a.first < b.first;
  if (a.second != b.second) return a.second < b.second;
  return a.restart < b.restart;
}

// torch.nan_to_num(double(x), nan=nan): infinities become the largest finite numbers, on the near side of `nan`.
EQR_INLINE double finite_or(float x, double nan) {
  constexpr double kMost = 1.7976931348623157e308;
  if (x != x) return nan;
  const double wide = double(x);
  return wide > kMost ? kMost : wide < -kMost ? -kMost : wide;
}

// Of a trajectory that has ended; `count` trajectories voted for its answer.
EQR_INLINE WinnerKey winner_key(Select rule, int64_t status, float score, float q_halt, int64_t steps, int64_t count,
                                int64_t restart) {
  constexpr double kInf = __builtin_huge_val();
  const double rank = status == kDiverged ? 2 : status == kCancelled ? 1 : 0;
  const double low_score = finite_or(score, kInf), unsettled = settled(status) ? 0 : 1;
  switch (rule) {
    case Select::vote: return {rank, -double(count), low_score, restart};
    case Select::q: return {rank, -finite_or(q_halt, -kInf), low_score, restart};
    case Select::first: return {rank, unsettled, settled(status) ? double(steps) : low_score, restart};
    default: return {rank, unsettled, low_score, restart};
  }
}

}  // namespace eqr
