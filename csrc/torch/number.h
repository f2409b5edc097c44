// Ops that give a number.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace eqr {

// It comes as a tensor, int64 []: an int that depends on data is nothing that torch.compile can trace.
inline torch::stable::Tensor number(const torch::stable::Tensor& like, int64_t value) {
  torch::stable::Tensor result = torch::stable::new_empty(like, {}, torch::headeronly::ScalarType::Long);
  *result.mutable_data_ptr<int64_t>() = value;
  return result;
}

}  // namespace eqr
