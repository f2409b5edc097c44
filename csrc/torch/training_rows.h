// What the ops of training share: the checks of the rows, the operands made of the weights, and rows computed by
// workers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/isa.h"
#include "cpu/operator.h"
#include "cpu/training_step.h"
#include "torch/checks.h"
#include "torch/floating_point.h"
#include "torch/operator_tensors.h"

namespace eqr {

// The n rows of a call, checked: tokens int64 [n, S], z_H, z_L float32 [n, S, d], rng int64 [n, 4].
struct TrainingRows {
  const Shape& shape;
  int64_t n, state;  // state: S d
  const int64_t *tokens, *rng;
  const float *z_H, *z_L;
  float noise_scale;

  TrainingRows(const char* op, const Shape& s, const torch::stable::Tensor& token, const torch::stable::Tensor& H,
               const torch::stable::Tensor& L, const torch::stable::Tensor& random, double scale)
      : shape(s), n(token.dim() == 2 ? token.size(0) : 0), state(s.tokens * s.features), noise_scale(float(scale)) {
    using torch::headeronly::ScalarType;
    if (s.heads) fail("sizes[5] (heads) must be 0: ", op, " takes token mixing by a SwiGLU only, got ", s.heads);
    if (n < 1) fail("tokens must be a contiguous int64 tensor [n >= 1, ", s.tokens, "], got shape ", eqr::shape(token));
    check_tensor("tokens", token, ScalarType::Long, {n, s.tokens});
    check_tensor("z_H", H, ScalarType::Float, {n, s.tokens, s.features});
    check_tensor("z_L", L, ScalarType::Float, {n, s.tokens, s.features});
    check_tensor("rng", random, ScalarType::Long, {n, 4});
    check_noise_scale(scale);
    tokens = token.const_data_ptr<int64_t>(), rng = random.const_data_ptr<int64_t>();
    z_H = H.const_data_ptr<float>(), z_L = L.const_data_ptr<float>();
    check_tokens("tokens", tokens, n, s.tokens, s.vocabulary);
    for (int64_t i = 0; i < n; ++i)
      if (rng[4 * i] >> 32 || rng[4 * i + 1] >> 32 || rng[4 * i + 3] >> 24 || rng[4 * i + 3] < 0)
        fail("rng must hold seed and restart in 0..2**32 - 1 and step in 0..2**24 - 1, got ", rng[4 * i], ", ",
             rng[4 * i + 1], " and ", rng[4 * i + 3], " in row ", i);
  }

  cpu::TrainingRow row(int64_t i, const float* last_H, const float* last_L) const {
    return {tokens + i * shape.tokens, rng + 4 * i, last_H, last_L, noise_scale};
  }
};

// The operands that an instruction set's kernels make of the weights, and workers with a scratch space each.
class TrainingWorkers {
 public:
  // `space`: [workers] times training_scratch().bytes(), as that says. With `recursions` for `recur` too.
  TrainingWorkers(const OperatorTensors& given, cpu::Isa isa, void* space, int64_t workers, bool recursions)
      : shape_(given.shape), isa_(isa), needed_(cpu::training_scratch(given.shape, isa)) {
    using torch::headeronly::ScalarType;
    if (reinterpret_cast<uintptr_t>(space) % 64)
      fail("scratch must lie at a multiple of 64 bytes; use scratch.clone()");
    for (int64_t w = 0; w < workers; ++w) spaces_.push_back(static_cast<char*>(space) + w * needed_.bytes());
    const Shape& s = shape_;
    const OperatorWeights weights = given.weights();
    // Without recursions that carry no gradient, nothing needs the operands of inference.
    recursions = recursions && s.H_cycles > 1;
    const int64_t inference = recursions ? cpu::packed_bytes(s, Precision::bf16, isa) : 0;
    inference_ = torch::stable::new_zeros(given.embedding, {inference}, ScalarType::Byte);
    packed_ =
        torch::stable::new_empty(given.embedding, {EQR_DISPATCH_TO(isa, training_packed_bytes, s)}, ScalarType::Byte);
    torch::stable::parallel_for(0, parts() + recursions, 1, [&](int64_t begin, int64_t end) {
      const DefaultFloatingPoint same_for_all;
      for (int64_t i = begin; i < end; ++i)
        i == parts()
            ? cpu::pack(s, Precision::bf16, isa, weights, static_cast<cpu::Packed*>(inference_.mutable_data_ptr()))
            : EQR_DISPATCH_TO(isa, training_pack, s, weights, i, packed_.mutable_data_ptr());
    });
    if (recursions)
      engine_ = cpu::engine(static_cast<const cpu::Packed*>(inference_.const_data_ptr()), inference_.numel());
  }

  const void* packed() const { return packed_.const_data_ptr(); }

  // visit(row, workspace) for each of n rows, a worker's one after another
  template <class Visit>
  void each_row(int64_t n, const Visit& visit) const {
    const int64_t workers = int64_t(spaces_.size());
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      const DefaultFloatingPoint same_for_all;
      for (int64_t w = begin; w < end; ++w) {
        EQR_DISPATCH_TO(isa_, training_begin, shape_, spaces_[size_t(w)]);
        for (int64_t i = n * w / workers; i < n * (w + 1) / workers; ++i) visit(i, spaces_[size_t(w)]);
      }
    });
  }

  // H, L [S, d] <- row i's states as only the last latent recursion is left
  void recur(const TrainingRows& rows, int64_t i, void* workspace, float* H, float* L) const {
    std::copy_n(rows.z_H + i * rows.state, rows.state, H);
    std::copy_n(rows.z_L + i * rows.state, rows.state, L);
    if (engine_)
      engine_->recur(engine_->packed, static_cast<char*>(workspace) + needed_.training,
                     {.tokens = rows.tokens + i * shape_.tokens,
                      .count = shape_.H_cycles - 1,
                      .z_H = H,
                      .z_L = L,
                      .eps = nullptr,
                      .eps_stride = 0,
                      .noise_scale = rows.noise_scale,
                      .rng = rows.rng + 4 * i});
  }

  // float32 [all weights], of all workers' rows
  torch::stable::Tensor gradients() const {
    torch::stable::Tensor out =
        torch::stable::new_empty(packed_, {cpu::gradient_floats(shape_)}, torch::headeronly::ScalarType::Float);
    torch::stable::parallel_for(0, parts(), 1, [&](int64_t begin, int64_t end) {
      const DefaultFloatingPoint same_for_all;
      for (int64_t i = begin; i < end; ++i)
        EQR_DISPATCH_TO(isa_, training_gradients, shape_, spaces_.data(), int64_t(spaces_.size()), i,
                        out.mutable_data_ptr<float>());
    });
    return out;
  }

 private:
  int64_t parts() const { return shape_.layers * cpu::kTrainingParts + 1; }

  const Shape shape_;
  const cpu::Isa isa_;
  const cpu::TrainingScratch needed_;
  std::vector<void*> spaces_;
  torch::stable::Tensor inference_, packed_;
  std::optional<cpu::Engine> engine_;
};

}  // namespace eqr
