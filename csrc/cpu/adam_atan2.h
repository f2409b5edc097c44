// An update of weights by AdamATan2 in one pass: p *= keep; p -= rate * atan2(m, root_scale * sqrt(v)), with m and v
// the moving averages of the gradient and of its square, this gradient included.
#pragma once

#include <stdint.h>

#include "cpu/isa.h"

namespace eqr::cpu {

struct AdamATan2 {
  float keep, rate, root_scale;
  float beta1, beta2, rest1, rest2;  // rest: 1 - beta
};

#define EQR_OPTIMIZER_KERNELS \
  void adam_atan2(const AdamATan2&, int64_t count, float* weights, const float* gradients, float* means, \
                  float* squares);
EQR_FOR_EACH_ISA(EQR_OPTIMIZER_KERNELS)
#undef EQR_OPTIMIZER_KERNELS

}  // namespace eqr::cpu
