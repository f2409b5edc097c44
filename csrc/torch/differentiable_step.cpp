// An outer step and its backward pass as two torch ops, for an objective of the caller's. The backward pass computes
// the last latent recursion again, from the states before it: they are all that is kept of the forward pass.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/training_rows.h"

namespace eqr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

OperatorTensors operator_of(const Tensor& embedding, const Tensor& lm_head, const Tensor& q_weight,
                            const Tensor& q_bias, const std::vector<Tensor>& blocks, const std::vector<int64_t>& sizes,
                            const std::vector<double>& constants) {
  return operator_tensors(embedding, lm_head, q_weight, q_bias, blocks, {}, {}, {}, {}, sizes, constants,
                          Precision::bf16);
}

// Of as many workers as have a row: uint8, zeros.
Tensor new_scratch(const Tensor& like, const Shape& s, cpu::Isa isa, int64_t workers) {
  return torch::stable::new_zeros(like, {workers * cpu::training_scratch(s, isa).bytes()}, ScalarType::Byte);
}

// Weights float32; tokens int64 [n, S]; z_H, z_L float32 [n, S, d]; rng int64 [n, 4] -> z_H, z_L, logits float32
// [n, S, V], q_halt float32 [n], and z_H, z_L as only the last latent recursion is left
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> differentiable_step(
    const Tensor& embedding, const Tensor& lm_head, const Tensor& q_weight, const Tensor& q_bias,
    const std::vector<Tensor>& blocks, const Tensor& tokens, const Tensor& z_H, const Tensor& z_L, const Tensor& rng,
    std::vector<int64_t> sizes, std::vector<double> constants, double noise_scale) {
  const OperatorTensors given = operator_of(embedding, lm_head, q_weight, q_bias, blocks, sizes, constants);
  const Shape& s = given.shape;
  const TrainingRows rows("differentiable_step", s, tokens, z_H, z_L, rng, noise_scale);
  const int64_t n = rows.n, logits_of_row = s.tokens * s.vocabulary;
  const cpu::Isa isa = cpu::isa();
  const int64_t count = std::min(int64_t(torch::stable::get_num_threads()), n);
  const DefaultFloatingPoint same_for_all;
  Tensor scratch = new_scratch(embedding, s, isa, count);
  const TrainingWorkers workers(given, isa, scratch.mutable_data_ptr(), count, true);
  Tensor new_H = torch::stable::empty_like(z_H), new_L = torch::stable::empty_like(z_L);
  Tensor last_H = torch::stable::empty_like(z_H), last_L = torch::stable::empty_like(z_L);
  Tensor logits = torch::stable::new_empty(z_H, {n, s.tokens, s.vocabulary}, ScalarType::Float);
  Tensor q_halt = torch::stable::new_empty(z_H, {n}, ScalarType::Float);
  workers.each_row(n, [&](int64_t i, void* workspace) {
    const auto of = [&](Tensor& t, int64_t size) { return t.mutable_data_ptr<float>() + i * size; };
    float *H = of(last_H, rows.state), *L = of(last_L, rows.state);
    workers.recur(rows, i, workspace, H, L);
    *of(q_halt, 1) = EQR_DISPATCH_TO(isa, training_forward, s, workers.packed(), workspace, rows.row(i, H, L),
                                     of(new_H, rows.state), of(new_L, rows.state), of(logits, logits_of_row));
  });
  return {new_H, new_L, logits, q_halt, last_H, last_L};
}

// As above, but for z_H, z_L as only the last latent recursion is left; of_logits float32 [n, S, V], of_q_halt float32
// [n]: their gradients; the gradients are summed by worker -> gradients float32 [all weights]
Tensor differentiable_step_backward(const Tensor& embedding, const Tensor& lm_head, const Tensor& q_weight,
                                    const Tensor& q_bias, const std::vector<Tensor>& blocks, const Tensor& tokens,
                                    const Tensor& z_H, const Tensor& z_L, const Tensor& rng, const Tensor& of_logits,
                                    const Tensor& of_q_halt, std::vector<int64_t> sizes, std::vector<double> constants,
                                    double noise_scale, int64_t workers_wanted) {
  const OperatorTensors given = operator_of(embedding, lm_head, q_weight, q_bias, blocks, sizes, constants);
  const Shape& s = given.shape;
  const TrainingRows rows("differentiable_step_backward", s, tokens, z_H, z_L, rng, noise_scale);
  const int64_t n = rows.n, logits_of_row = s.tokens * s.vocabulary;
  check_tensor("of_logits", of_logits, ScalarType::Float, {n, s.tokens, s.vocabulary});
  check_tensor("of_q_halt", of_q_halt, ScalarType::Float, {n});
  check_range("workers", workers_wanted, 1, 4096);
  const cpu::Isa isa = cpu::isa();
  const int64_t count = std::min(workers_wanted, n);
  const DefaultFloatingPoint same_for_all;
  Tensor scratch = new_scratch(embedding, s, isa, count);
  const TrainingWorkers workers(given, isa, scratch.mutable_data_ptr(), count, false);
  const float *logits = of_logits.const_data_ptr<float>(), *q_halt = of_q_halt.const_data_ptr<float>();
  workers.each_row(n, [&](int64_t i, void* workspace) {
    EQR_DISPATCH_TO(isa, training_backward, s, workers.packed(), workspace,
                    rows.row(i, rows.z_H + i * rows.state, rows.z_L + i * rows.state), logits + i * logits_of_row,
                    q_halt[i]);
  });
  return workers.gradients();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eqr_kernels, m) {
  m.def(
      "differentiable_step(Tensor embedding, Tensor lm_head, Tensor q_weight, Tensor q_bias, Tensor[] blocks, "
      "Tensor tokens, Tensor z_H, Tensor z_L, Tensor rng, int[] sizes, float[] constants, float noise_scale) -> "
      "(Tensor new_H, Tensor new_L, Tensor logits, Tensor q_halt, Tensor last_H, Tensor last_L)");
  m.def(
      "differentiable_step_backward(Tensor embedding, Tensor lm_head, Tensor q_weight, Tensor q_bias, "
      "Tensor[] blocks, Tensor tokens, Tensor z_H, Tensor z_L, Tensor rng, Tensor of_logits, Tensor of_q_halt, "
      "int[] sizes, float[] constants, float noise_scale, int workers) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(eqr_kernels, CPU, m) {
  m.impl("differentiable_step", TORCH_BOX(&differentiable_step));
  m.impl("differentiable_step_backward", TORCH_BOX(&differentiable_step_backward));
}

}  // namespace eqr
