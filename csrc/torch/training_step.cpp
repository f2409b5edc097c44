// A training step's outer step, forward and backward, as a torch op.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/training_rows.h"

namespace eqr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Weights float32; tokens, labels int64 [n, S]; z_H, z_L float32 [n, S, d]; rng int64 [n, 4]; scratch uint8 [workers,
// bytes] -> z_H, z_L, loss float64 [n], q_halt, residual float32 [n], exact bool [n], gradients float32 [all weights]
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> training_step(
    const Tensor& embedding, const Tensor& lm_head, const Tensor& q_weight, const Tensor& q_bias,
    const std::vector<Tensor>& blocks, const Tensor& tokens, const Tensor& labels, const Tensor& z_H, const Tensor& z_L,
    const Tensor& rng, const Tensor& scratch, std::vector<int64_t> sizes, std::vector<double> constants,
    double noise_scale) {
  const OperatorTensors given =
      operator_tensors(embedding, lm_head, q_weight, q_bias, blocks, {}, {}, {}, {}, sizes, constants, Precision::bf16);
  const Shape& s = given.shape;
  const TrainingRows rows("training_step", s, tokens, z_H, z_L, rng, noise_scale);
  const int64_t n = rows.n, state = rows.state;
  check_tensor("labels", labels, ScalarType::Long, {n, s.tokens});
  const int64_t* label = labels.const_data_ptr<int64_t>();
  check_tokens("labels", label, n, s.tokens, s.vocabulary);

  const cpu::Isa isa = cpu::isa();
  const int64_t needed = cpu::training_scratch(s, isa).bytes();
  if (scratch.dim() != 2 || scratch.size(0) < 1)
    fail("scratch must be a contiguous uint8 tensor [workers >= 1, ", needed, "], got shape ", shape(scratch));
  check_tensor("scratch", scratch, ScalarType::Byte, {scratch.size(0), needed});

  const DefaultFloatingPoint same_for_all;
  const TrainingWorkers workers(given, isa, scratch.mutable_data_ptr(), scratch.size(0), true);
  Tensor new_H = torch::stable::empty_like(z_H), new_L = torch::stable::empty_like(z_L);
  const auto make = [&](ScalarType dtype) { return torch::stable::new_empty(z_H, {n}, dtype); };
  Tensor loss = make(ScalarType::Double), q_halt = make(ScalarType::Float), residual = make(ScalarType::Float);
  Tensor exact = make(ScalarType::Bool);
  float *H = new_H.mutable_data_ptr<float>(), *L = new_L.mutable_data_ptr<float>();
  workers.each_row(n, [&](int64_t i, void* workspace) {
    float *to_H = H + i * state, *to_L = L + i * state;
    workers.recur(rows, i, workspace, to_H, to_L);
    const cpu::TrainingTarget target = {label + i * s.tokens, rows.z_H + i * state, rows.z_L + i * state,
                                        1.0f / float(n)};
    const cpu::TrainingResult result =
        EQR_DISPATCH_TO(isa, training_row, s, workers.packed(), workspace, rows.row(i, to_H, to_L), target, to_H, to_L);
    loss.mutable_data_ptr<double>()[i] = result.loss;
    q_halt.mutable_data_ptr<float>()[i] = result.q_halt;
    residual.mutable_data_ptr<float>()[i] = result.residual;
    exact.mutable_data_ptr<bool>()[i] = result.exact;
  });
  return {new_H, new_L, loss, q_halt, residual, exact, workers.gradients()};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eqr_kernels, m) {
  m.def(
      "training_step(Tensor embedding, Tensor lm_head, Tensor q_weight, Tensor q_bias, Tensor[] blocks, "
      "Tensor tokens, Tensor labels, Tensor z_H, Tensor z_L, Tensor rng, Tensor(a!) scratch, int[] sizes, "
      "float[] constants, float noise_scale) -> (Tensor new_H, Tensor new_L, Tensor loss, Tensor q_halt, "
      "Tensor residual, Tensor exact, Tensor gradients)");
}

STABLE_TORCH_LIBRARY_IMPL(eqr_kernels, CPU, m) { m.impl("training_step", TORCH_BOX(&training_step)); }

}  // namespace eqr
