// What the op pack_weights is on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>

#include "torch/operator_tensors.h"

namespace eqr {

// -> uint8 [bytes], where the weights are
torch::stable::Tensor pack_on_cpu(const OperatorTensors&);
torch::stable::Tensor pack_on_cuda(const OperatorTensors&, const std::string& layout);  // of a build with CUDA kernels

}  // namespace eqr
