// What each file of kernels tells launch.cu of its own. (Names of kernels stay in their files: nvcc gives the host's
// side of a kernel template internal linkage.)
#pragma once

#include "cuda/launch.h"

namespace eqr::cuda {

struct Kernel {
  const void* function;  // takes a Problem
  int threads;
  int64_t shared_bytes;  // dynamic
  Order order;           // of the packed weights
  int64_t (*slot_bytes)(const Shape&, int64_t ring);
  int64_t (*work_bytes)(const Shape&);  // of the device's memory, besides slots; null: none
};

// For 128, 256 or 512 features.
Kernel throughput_mma_kernel(int64_t features);
Kernel throughput_wgmma_kernel(int64_t features);
Kernel latency_kernel(int64_t features);
Kernel kernel_of(Plan::Kernel, int64_t features);

// On the stream: a token out of range ends all work on the device, as with torch's own kernels.
void check_tokens(const Problem&, cudaStream_t);

// Has the selection's code on the device. Loading it may wait for all that runs there, and so must come before a run.
void load_selection();

template <template <int> class Of>
Kernel of_features(int64_t features) {
  return features == 128 ? Of<128>::kernel() : features == 256 ? Of<256>::kernel() : Of<512>::kernel();
}

}  // namespace eqr::cuda
