// The CUDA kernels by their names, and the tensors of packed weights that they read.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"

namespace eqr::cuda {

constexpr Plan::Kernel kKernels[] = {Plan::Kernel::throughput_mma, Plan::Kernel::throughput_wgmma,
                                     Plan::Kernel::latency};

// The layout of packed weights is named after the kernel that reads it.
inline Plan::Kernel kernel_of_layout(const std::string& layout) {
  std::string names;
  for (Plan::Kernel kernel : kKernels) {
    if (layout == kernel_name(kernel)) return kernel;
    names += (names.empty() ? "" : ", ") + std::string(kernel_name(kernel));
  }
  throw std::invalid_argument("layout must be one of " + names + " on a CUDA device, got '" + layout +
                              "'; it is the kernel of the plan that is to run");
}

inline Regime regime_of(const std::string& name) {
  if (name == "auto") return Regime::automatic;
  if (name == "throughput") return Regime::throughput;
  if (name == "latency") return Regime::latency;
  throw std::invalid_argument("regime must be one of auto, throughput, latency, got '" + name + "'");
}

// The host must know the layout of packed weights without a look at the device's memory: their length tells it.
constexpr int64_t kLayoutStep = 128;

inline int64_t packed_length(const Shape& s, Plan::Kernel kernel) {
  return packed_bytes(s) + kLayoutStep * int64_t(kernel);
}

inline Plan::Kernel kernel_of_length(const Shape& s, int64_t length) {
  for (Plan::Kernel kernel : kKernels)
    if (length == packed_length(s, kernel)) return kernel;
  throw std::invalid_argument("packed has " + std::to_string(length) +
                              " bytes, and pack_weights gives no such number "
                              "for these sizes; pack the weights on their device with the same sizes");
}

}  // namespace eqr::cuda
