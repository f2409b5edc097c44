// The state update of one module application, with its noise and its residual, as a torch op.
//
// This folder is the only one that knows torch: a file an op, with its schema, its checks and its kernels' dispatch,
// through torch's stable ABI, so that one build serves torch 2.11 and later. module.cpp makes the same library a Python
// module.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/block.h"
#include "cpu/damped_update.h"
#include "cpu/isa.h"
#include "cpu/tree_sum.h"
#include "torch/checks.h"

namespace eqr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_like(const char* name, const Tensor& t, const Tensor& z) {
  bool same = t.scalar_type() == z.scalar_type() && t.dim() == 3 && t.is_contiguous();
  for (int64_t i = 0; same && i < 3; ++i) same = t.size(i) == z.size(i);
  if (!same) fail(name, " must be contiguous, of the shape ", shape(z), " and dtype of z, got shape ", shape(t));
}

// z, u, z_prev: [n, S, d] float32 or bfloat16; rng: [n, 4] -> out [n, S, d], diff_sq and norm_sq [n] (or [0]) float32
std::tuple<Tensor, Tensor, Tensor> damped_update(const Tensor& z, const Tensor& u, const Tensor& rng, int64_t stream,
                                                 double lambda_, double noise_scale, std::optional<Tensor> z_prev) {
  const bool bf16 = z.scalar_type() == ScalarType::BFloat16;
  if (!bf16 && z.scalar_type() != ScalarType::Float) fail("z must be float32 or bfloat16; convert it with .float()");
  if (z.dim() != 3 || !z.is_contiguous()) fail("z must be contiguous [n, S, d], got shape ", shape(z));
  check_like("u", u, z);
  if (z_prev) check_like("z_prev", *z_prev, z);
  check_rng(rng, stream);
  const int64_t n = z.size(0), row = z.size(1) * z.size(2), blocks = cpu::block_count(row);
  if (rng.size(0) != n) fail("rng must have one row for each row of z, ", n, ", got ", rng.size(0));
  check_numel(row);
  if (!std::isfinite(lambda_)) fail("lambda_ must be finite, got ", lambda_);
  check_noise_scale(noise_scale);

  Tensor out = torch::stable::empty_like(z);
  Tensor diff_sq = torch::stable::new_empty(z, {z_prev ? n : 0}, ScalarType::Float);
  Tensor norm_sq = torch::stable::new_empty(z, {z_prev ? n : 0}, ScalarType::Float);
  std::vector<float> partial(z_prev ? size_t(n * 2 * blocks) : 0);
  const cpu::DampedUpdate a{
      .z = z.const_data_ptr(),
      .u = u.const_data_ptr(),
      .z_prev = z_prev ? z_prev->const_data_ptr() : nullptr,
      .rng = rng.const_data_ptr<int64_t>(),
      .out = out.mutable_data_ptr(),
      .partial = partial.data(),
      .row = row,
      .blocks = blocks,
      .stream = uint32_t(stream),
      .keep = float(1.0 - lambda_),
      .lambda = float(lambda_),
      .noise_scale = float(noise_scale),
  };
  cpu::isa();  // what it throws must not come from another thread, where the message is lost
  torch::stable::parallel_for(0, n * blocks, cpu::kGrain, [&](int64_t begin, int64_t end) {
    if (bf16)
      EQR_DISPATCH(damped_update<uint16_t>, a, begin, end);
    else
      EQR_DISPATCH(damped_update<float>, a, begin, end);
  });
  if (z_prev) {
    float* diff = diff_sq.mutable_data_ptr<float>();
    float* norm = norm_sq.mutable_data_ptr<float>();
    for (int64_t i = 0; i < n; ++i) {
      diff[i] = cpu::tree_sum(a.partial + 2 * i * blocks, blocks);
      norm[i] = cpu::tree_sum(a.partial + (2 * i + 1) * blocks, blocks);
    }
  }
  return {out, diff_sq, norm_sq};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eqr_kernels, m) {
  m.def(
      "damped_update(Tensor z, Tensor u, Tensor rng, int stream, float lambda_, float noise_scale, "
      "Tensor? z_prev=None) -> (Tensor out, Tensor diff_sq, Tensor norm_sq)");
}

STABLE_TORCH_LIBRARY_IMPL(eqr_kernels, CPU, m) { m.impl("damped_update", TORCH_BOX(&damped_update)); }

}  // namespace eqr
