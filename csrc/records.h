// The rules of a fixed-point run and what is written down of its trajectories, for every backend.
// T trajectories of S tokens.
#pragma once

#include <stdint.h>

namespace eqr {

enum class Halt : int32_t { none, residual, q };
enum class Select : int32_t { residual, vote, q, first };
enum Status : int64_t { kConverged = 0, kHalted, kMaxDepth, kCancelled, kDiverged, kGoing = -1 };

struct Records {
  int64_t* preds;                    // [T, S]
  float *q_halt, *residual, *score;  // [T]
  int64_t *steps, *status;           // [T]
};

}  // namespace eqr
