// The packing of weights, and the check of tokens: what happens on the device before a run.
#undef NDEBUG  // a token out of range must never read memory out of bounds
#include "cuda/pack.h"

#include <cassert>

#include "cuda/check.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace eqr::cuda {
namespace {

constexpr int kThreads = 256, kCtas = 1024;

}  // namespace

__global__ void __launch_bounds__(kThreads, 1) pack_layer_kernel(const __grid_constant__ Pack a, int64_t layer) {
  pack_layer<Device>(a, layer, int64_t{blockIdx.x} * kThreads + threadIdx.x, int64_t{gridDim.x} * kThreads);
}

__global__ void __launch_bounds__(kThreads, 1) pack_rest_kernel(const __grid_constant__ Pack a) {
  pack_rest<Device>(a, int64_t{blockIdx.x} * kThreads + threadIdx.x, int64_t{gridDim.x} * kThreads);
}

// tokens: [count]
__global__ void __launch_bounds__(kThreads, 1) check_tokens_kernel(const int64_t* tokens, int64_t count, int64_t most) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads)
    assert(tokens[i] >= 0 && tokens[i] <= most && "tokens must be in 0..vocabulary - 1");
}

void pack(const Shape& s, Plan::Kernel kernel, const OperatorWeights& weights, void* packed, cudaStream_t stream) {
  Pack a{};
  a.shape = s;
  a.order = kernel_of(kernel, s.features).order;
  a.layout = layout_of(s);
  a.weights = weights;
  a.packed = static_cast<char*>(packed);
  for (int64_t layer = 0; layer < s.layers; ++layer) {
    a.block = weights.blocks[layer];
    pack_layer_kernel<<<kCtas, kThreads, 0, stream>>>(a, layer);
  }
  pack_rest_kernel<<<kCtas, kThreads, 0, stream>>>(a);
  check(cudaGetLastError(), "launching pack_layer_kernel and pack_rest_kernel");
}

void check_tokens(const Problem& p, cudaStream_t stream) {
  const int64_t count = p.puzzles * p.shape.tokens, ctas = (count + kThreads - 1) / kThreads;
  check_tokens_kernel<<<unsigned(ctas < kCtas ? ctas : kCtas), kThreads, 0, stream>>>(p.tokens, count,
                                                                                      p.shape.vocabulary - 1);
  check(cudaGetLastError(), "launching check_tokens_kernel");
}

}  // namespace eqr::cuda
