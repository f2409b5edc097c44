// What the registers alone can do: the peak rate of the multiply-adds that the hot tiles are made of.
#pragma once

#include <stdint.h>

#include "cpu/operator.h"

namespace eqr::cpu {

// Runs `rounds` of independent multiply-adds in registers alone, on the calling thread. Returns the operations done,
// two a multiply-add, or 0 where the instructions are not there (a build that emulates AVX-512, or an architecture
// without a meter). Where there are no bf16 instructions the kernels compute bf16 in fp32, and so does this.
#define EQR_PEAK_KERNELS int64_t peak_burst(Precision precision, int64_t rounds);
EQR_FOR_EACH_ISA(EQR_PEAK_KERNELS)
#undef EQR_PEAK_KERNELS

}  // namespace eqr::cpu
