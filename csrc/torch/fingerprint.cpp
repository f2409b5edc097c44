// A hash of tensors by their bytes, as a torch op.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "cpu/fingerprint.h"
#include "torch/checks.h"
#include "torch/number.h"

namespace eqr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// tensors: of any shapes and dtypes, at least one -> int64 []
Tensor fingerprint(const std::vector<Tensor>& tensors) {
  if (tensors.empty()) fail("tensors must hold at least one tensor, got none");
  uint64_t hash = tensors.size();
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    if (!t.is_cpu() || !t.is_contiguous())
      fail("tensors[", i, "] must be contiguous and on CPU, got shape ", shape(t), "; use .contiguous() and .cpu()");
    std::vector<int64_t> about(t.sizes().begin(), t.sizes().end());
    about.push_back(int64_t(t.scalar_type()));
    hash = cpu::fingerprint(about.data(), int64_t(about.size() * sizeof(int64_t)), hash);
    hash = cpu::fingerprint(t.const_data_ptr(), t.numel() * int64_t(t.element_size()), hash);
  }
  return number(tensors[0], int64_t(hash));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eqr_kernels, m) { m.def("fingerprint(Tensor[] tensors) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(eqr_kernels, CPU, m) { m.impl("fingerprint", TORCH_BOX(&fingerprint)); }

}  // namespace eqr
