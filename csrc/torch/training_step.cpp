// A training step's outer step, forward and backward, as a torch op.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/operator.h"
#include "cpu/training_step.h"
#include "torch/checks.h"
#include "torch/floating_point.h"
#include "torch/operator_tensors.h"

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
  const OperatorWeights weights = given.weights();
  const Shape& s = given.shape;
  if (s.heads) fail("sizes[5] (heads) must be 0: training_step takes token mixing by a SwiGLU only, got ", s.heads);
  if (tokens.dim() != 2 || tokens.size(0) < 1)
    fail("tokens must be a contiguous int64 tensor [n >= 1, ", s.tokens, "], got shape ", shape(tokens));
  const int64_t n = tokens.size(0), S = s.tokens, d = s.features, row = S * d;
  check_tensor("tokens", tokens, ScalarType::Long, {n, S});
  check_tensor("labels", labels, ScalarType::Long, {n, S});
  check_tensor("z_H", z_H, ScalarType::Float, {n, S, d});
  check_tensor("z_L", z_L, ScalarType::Float, {n, S, d});
  check_tensor("rng", rng, ScalarType::Long, {n, 4});
  check_noise_scale(noise_scale);
  const int64_t *token = tokens.const_data_ptr<int64_t>(), *label = labels.const_data_ptr<int64_t>();
  const int64_t* random = rng.const_data_ptr<int64_t>();
  check_tokens("tokens", token, n, S, s.vocabulary);
  check_tokens("labels", label, n, S, s.vocabulary);
  for (int64_t i = 0; i < n; ++i)
    if (random[4 * i] >> 32 || random[4 * i + 1] >> 32 || random[4 * i + 3] >> 24 || random[4 * i + 3] < 0)
      fail("rng must hold seed and restart in 0..2**32 - 1 and step in 0..2**24 - 1, got ", random[4 * i], ", ",
           random[4 * i + 1], " and ", random[4 * i + 3], " in row ", i);

  const cpu::Isa isa = cpu::isa();
  const cpu::TrainingScratch needed = cpu::training_scratch(s, isa);
  if (scratch.dim() != 2 || scratch.size(0) < 1)
    fail("scratch must be a contiguous uint8 tensor [workers >= 1, ", needed.bytes(), "], got shape ", shape(scratch));
  const int64_t workers = scratch.size(0);
  check_tensor("scratch", scratch, ScalarType::Byte, {workers, needed.bytes()});
  char* space = static_cast<char*>(scratch.mutable_data_ptr());
  if (reinterpret_cast<uintptr_t>(space) % 64) fail("scratch must lie at a multiple of 64 bytes; use scratch.clone()");

  const DefaultFloatingPoint same_for_all;
  const int64_t recursions = s.H_cycles - 1, parts = s.layers * cpu::kTrainingParts + 1;
  // Without recursions that carry no gradient, nothing needs the operands of inference.
  const int64_t inference_bytes = recursions ? cpu::packed_bytes(s, Precision::bf16, isa) : 0;
  Tensor inference = torch::stable::new_zeros(embedding, {inference_bytes}, ScalarType::Byte);
  Tensor packed =
      torch::stable::new_empty(embedding, {EQR_DISPATCH_TO(isa, training_packed_bytes, s)}, ScalarType::Byte);
  torch::stable::parallel_for(0, parts + (recursions != 0), 1, [&](int64_t begin, int64_t end) {
    const DefaultFloatingPoint same_for_all;
    for (int64_t i = begin; i < end; ++i)
      i == parts ? cpu::pack(s, Precision::bf16, isa, weights, static_cast<cpu::Packed*>(inference.mutable_data_ptr()))
                 : EQR_DISPATCH_TO(isa, training_pack, s, weights, i, packed.mutable_data_ptr());
  });
  std::optional<cpu::Engine> engine;
  if (recursions) engine = cpu::engine(static_cast<const cpu::Packed*>(inference.const_data_ptr()), inference.numel());

  Tensor new_H = torch::stable::empty_like(z_H), new_L = torch::stable::empty_like(z_L);
  const auto make = [&](ScalarType dtype, int64_t count) { return torch::stable::new_empty(z_H, {count}, dtype); };
  Tensor loss = make(ScalarType::Double, n), q_halt = make(ScalarType::Float, n), residual = make(ScalarType::Float, n);
  Tensor exact = make(ScalarType::Bool, n), gradients = make(ScalarType::Float, cpu::gradient_floats(s));
  float *H = new_H.mutable_data_ptr<float>(), *L = new_L.mutable_data_ptr<float>();
  const float *start_H = z_H.const_data_ptr<float>(), *start_L = z_L.const_data_ptr<float>();
  std::vector<void*> spaces;
  for (int64_t w = 0; w < workers; ++w) spaces.push_back(space + w * needed.bytes());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const DefaultFloatingPoint same_for_all;
    for (int64_t w = begin; w < end; ++w) {
      EQR_DISPATCH_TO(isa, training_begin, s, spaces[size_t(w)]);
      for (int64_t i = n * w / workers; i < n * (w + 1) / workers; ++i) {
        std::copy_n(start_H + i * row, row, H + i * row);
        std::copy_n(start_L + i * row, row, L + i * row);
        if (engine)
          engine->recur(engine->packed, static_cast<char*>(spaces[size_t(w)]) + needed.training,
                        {.tokens = token + i * S,
                         .count = recursions,
                         .z_H = H + i * row,
                         .z_L = L + i * row,
                         .eps = nullptr,
                         .eps_stride = 0,
                         .noise_scale = float(noise_scale),
                         .rng = random + 4 * i});
        const cpu::TrainingResult result =
            EQR_DISPATCH_TO(isa, training_row, s, packed.const_data_ptr(), spaces[size_t(w)],
                            {.tokens = token + i * S,
                             .labels = label + i * S,
                             .rng = random + 4 * i,
                             .start_H = start_H + i * row,
                             .start_L = start_L + i * row,
                             .z_H = H + i * row,
                             .z_L = L + i * row,
                             .noise_scale = float(noise_scale),
                             .share = 1.0f / float(n)});
        loss.mutable_data_ptr<double>()[i] = result.loss;
        q_halt.mutable_data_ptr<float>()[i] = result.q_halt;
        residual.mutable_data_ptr<float>()[i] = result.residual;
        exact.mutable_data_ptr<bool>()[i] = result.exact;
      }
    }
  });
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const DefaultFloatingPoint same_for_all;
    for (int64_t i = begin; i < end; ++i)
      EQR_DISPATCH_TO(isa, training_gradients, s, spaces.data(), workers, i, gradients.mutable_data_ptr<float>());
  });
  return {new_H, new_L, loss, q_halt, residual, exact, gradients};
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
