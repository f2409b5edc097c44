// Packed weights on CPU, as the ops take them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "cpu/operator.h"
#include "torch/checks.h"

namespace eqr::cpu {

inline const Packed* packed_data(const torch::stable::Tensor& packed) {
  if (!packed.is_cpu() || packed.scalar_type() != torch::headeronly::ScalarType::Byte || packed.dim() != 1 ||
      !packed.is_contiguous())
    fail("packed must be a contiguous uint8 tensor [bytes] on CPU, got ", dtype_name(packed.scalar_type()), " ",
         shape(packed), "; make it with pack_weights");
  const void* data = packed.const_data_ptr();
  if (reinterpret_cast<uintptr_t>(data) % 64)
    fail("packed must lie at a multiple of 64 bytes, and this view of it does not; use packed.clone()");
  return static_cast<const Packed*>(data);
}

// packed: uint8 [bytes]
inline Engine engine_of(const torch::stable::Tensor& packed) { return engine(packed_data(packed), packed.numel()); }

}  // namespace eqr::cpu
