// An update of the weights by AdamATan2 as a torch op.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cpu/adam_atan2.h"
#include "cpu/isa.h"
#include "torch/checks.h"
#include "torch/floating_point.h"

namespace eqr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// weights, gradients, means and squares: as many float32 tensors of each, alike in their shapes
void adam_atan2_(std::vector<Tensor> weights, std::vector<Tensor> gradients, std::vector<Tensor> means,
                 std::vector<Tensor> squares, double lr, double beta1, double beta2, double weight_decay,
                 int64_t step) {
  if (gradients.size() != weights.size() || means.size() != weights.size() || squares.size() != weights.size())
    fail("gradients, means and squares must be as many tensors as weights, ", weights.size(), ", got ",
         gradients.size(), ", ", means.size(), " and ", squares.size());
  if (!std::isfinite(lr) || lr < 0 || !std::isfinite(weight_decay) || weight_decay < 0)
    fail("lr and weight_decay must be finite and at least 0, got ", lr, " and ", weight_decay);
  if (!(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1))
    fail("beta1 and beta2 must be in [0, 1), got ", beta1, " and ", beta2);
  if (step < 1) fail("step must be at least 1, the number of this update, got ", step);
  constexpr int64_t kPiece = 8192;
  struct Piece {
    int64_t count;
    float* weights;
    const float* gradients;
    float *means, *squares;
  };
  std::vector<Piece> pieces;
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto sizes = weights[i].sizes();
    const std::vector<int64_t> like(sizes.begin(), sizes.end());
    const auto check = [&](const char* name, const Tensor& tensor) {
      check_tensor(std::string(name) + "[" + std::to_string(i) + "]", tensor, ScalarType::Float, like);
    };
    check("weights", weights[i]), check("gradients", gradients[i]);
    check("means", means[i]), check("squares", squares[i]);
    float *w = weights[i].mutable_data_ptr<float>(), *m = means[i].mutable_data_ptr<float>();
    float* v = squares[i].mutable_data_ptr<float>();
    const float* g = gradients[i].const_data_ptr<float>();
    const int64_t count = weights[i].numel();
    for (int64_t n = 0; n < count; n += kPiece)
      pieces.push_back({std::min(kPiece, count - n), w + n, g + n, m + n, v + n});
  }
  const double age = double(step);
  const cpu::AdamATan2 by = {.keep = float(1 - lr * weight_decay),
                             .rate = float(lr / (1 - std::pow(beta1, age))),
                             .root_scale = float(1 / std::sqrt(1 - std::pow(beta2, age))),
                             .beta1 = float(beta1),
                             .beta2 = float(beta2),
                             .rest1 = float(1 - beta1),
                             .rest2 = float(1 - beta2)};
  const cpu::Isa isa = cpu::isa();
  torch::stable::parallel_for(0, int64_t(pieces.size()), 4, [&](int64_t begin, int64_t end) {
    const DefaultFloatingPoint same_for_all;
    for (int64_t i = begin; i < end; ++i) {
      const Piece& p = pieces[size_t(i)];
      EQR_DISPATCH_TO(isa, adam_atan2, by, p.count, p.weights, p.gradients, p.means, p.squares);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eqr_kernels, m) {
  m.def(
      "adam_atan2_(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] means, Tensor(c!)[] squares, float lr, "
      "float beta1, float beta2, float weight_decay, int step) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(eqr_kernels, CPU, m) { m.impl("adam_atan2_", TORCH_BOX(&adam_atan2_)); }

}  // namespace eqr
