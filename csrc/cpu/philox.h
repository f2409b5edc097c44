// The random words and standard normals of trajectories, as the state update draws them.
#pragma once

#include <stdint.h>

#include "cpu/isa.h"

namespace eqr::cpu {

struct Philox {
  const int64_t* rng;  // [n, 4]: seed, restart, id, step
  int64_t row;         // elements of a trajectory
  int64_t blocks;      // ceil(row / 1024)
  uint32_t stream;
};

// Work items [begin, end) of the n * blocks items; item i is block i % blocks of row i / blocks. out: [n, row].
#define EQR_PHILOX_KERNELS \
  void philox_words(const Philox& a, int64_t* out, int64_t begin, int64_t end); \
  void philox_normal(const Philox& a, float* out, int64_t begin, int64_t end);
EQR_FOR_EACH_ISA(EQR_PHILOX_KERNELS)
#undef EQR_PHILOX_KERNELS

}  // namespace eqr::cpu
