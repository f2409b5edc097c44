// The damped state update of a fixed-point iteration: out = (1 - lambda) z + lambda u + noise_scale eps, in one pass,
// and, when the state of the step before is given, the parts of the residual ||out - z_prev|| / ||out||.
#pragma once

#include <stdint.h>

#include "cpu/isa.h"

namespace eqr::cpu {

struct DampedUpdate {
  const void* z;       // [n, row] float or bfloat16 (as uint16_t), and so are u, z_prev and out
  const void* u;       // [n, row]
  const void* z_prev;  // [n, row], or null: no partial sums
  const int64_t* rng;  // [n, 4]: seed, restart, id, step
  void* out;           // [n, row]
  float* partial;      // [n, 2, blocks]: each block's sum of (out - z_prev)^2, then of out^2
  int64_t row;         // elements of a trajectory, S * d
  int64_t blocks;      // ceil(row / 1024)
  uint32_t stream;
  float keep, lambda, noise_scale;  // keep = 1 - lambda; with noise_scale 0 no random number is drawn
};

// Work items [begin, end) of the n * blocks items; item i is block i % blocks of row i / blocks. T: float or uint16_t.
#define EQR_DAMPED_UPDATE_KERNELS \
  template <class T> \
  void damped_update(const DampedUpdate& a, int64_t begin, int64_t end);
EQR_FOR_EACH_ISA(EQR_DAMPED_UPDATE_KERNELS)
#undef EQR_DAMPED_UPDATE_KERNELS

}  // namespace eqr::cpu
