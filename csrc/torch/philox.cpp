// The words and normals of the random streams as torch ops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cpu/block.h"
#include "cpu/isa.h"
#include "cpu/philox.h"
#include "torch/checks.h"

namespace eqr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T, class Kernel>
Tensor fill_random(const Tensor& rng, int64_t stream, int64_t numel, ScalarType dtype, const Kernel& kernel) {
  check_rng(rng, stream);
  check_numel(numel);
  const int64_t n = rng.size(0), blocks = cpu::block_count(numel);
  Tensor out = torch::stable::new_empty(rng, {n, numel}, dtype);
  const cpu::Philox a{rng.const_data_ptr<int64_t>(), numel, blocks, uint32_t(stream)};
  T* data = out.mutable_data_ptr<T>();
  cpu::isa();  // what it throws must not come from another thread
  torch::stable::parallel_for(0, n * blocks, cpu::kGrain,
                              [&](int64_t begin, int64_t end) { kernel(a, data, begin, end); });
  return out;
}

// rng: [n, 4] -> int64 [n, numel], 32-bit words
Tensor philox_words(const Tensor& rng, int64_t stream, int64_t numel) {
  const auto kernel = [](const cpu::Philox& a, int64_t* out, int64_t begin, int64_t end) {
    EQR_DISPATCH(philox_words, a, out, begin, end);
  };
  return fill_random<int64_t>(rng, stream, numel, ScalarType::Long, kernel);
}

// rng: [n, 4] -> float32 [n, numel], standard normals
Tensor philox_normal(const Tensor& rng, int64_t stream, int64_t numel) {
  const auto kernel = [](const cpu::Philox& a, float* out, int64_t begin, int64_t end) {
    EQR_DISPATCH(philox_normal, a, out, begin, end);
  };
  return fill_random<float>(rng, stream, numel, ScalarType::Float, kernel);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eqr_kernels, m) {
  m.def("philox_words(Tensor rng, int stream, int numel) -> Tensor");
  m.def("philox_normal(Tensor rng, int stream, int numel) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(eqr_kernels, CPU, m) {
  m.impl("philox_words", TORCH_BOX(&philox_words));
  m.impl("philox_normal", TORCH_BOX(&philox_normal));
}

}  // namespace eqr
