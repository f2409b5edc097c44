// The arithmetic of a run, by the names that eqr_kernels/precision.py has.
#pragma once

#include <stdint.h>

namespace eqr {

enum class Precision : int32_t { fp32, bf16, int8 };

constexpr Precision kPrecisions[] = {Precision::fp32, Precision::bf16, Precision::int8};

constexpr const char* precision_name(Precision precision) {
  switch (precision) {
    case Precision::fp32: return "fp32";
    case Precision::bf16: return "bf16";
    default: return "int8";
  }
}

}  // namespace eqr
