// The state update and the random numbers as torch ops. The files ops*.cpp and ops*.h are the only ones that know
// torch: schemas, checks and dispatch of torch.ops.eqr_kernels.*, through torch's stable ABI, so that
// one build serves torch 2.11 and later. bindings.cpp makes the same library a Python module.
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
#include "cpu/philox.h"
#include "cpu/tree_sum.h"
#include "ops_checks.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using eqr::fail;
using eqr::shape;
using eqr::cpu::kBlock;

constexpr int64_t kGrain = 8;  // work items below which a second thread costs more than it saves

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// rng: int64 [n, 4] with the columns seed, restart, id, step
void check_rng(const Tensor& rng, int64_t stream) {
  const bool int64 = rng.scalar_type() == ScalarType::Long;
  if (!int64 || rng.dim() != 2 || rng.size(1) != 4 || !rng.is_contiguous())
    fail("rng must be a contiguous int64 tensor [n, 4] (seed, restart, id, step), got shape ", shape(rng),
         int64 ? "" : " of another dtype", "; build it with eqr_kernels.noise.make_rng");
  if (stream < 0 || stream > 255) fail("stream must be in 0..255, got ", stream);
  const int64_t* row = rng.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rng.size(0); ++i, row += 4) {
    if (row[0] < 0 || row[0] >> 32) fail("rng column 0 (seed) must be in 0..2**32 - 1, got ", row[0], " in row ", i);
    if (row[1] < 0 || row[1] >> 32) fail("rng column 1 (restart) must be in 0..2**32 - 1, got ", row[1], " in row ", i);
    if (row[3] < 0 || row[3] >> 24) fail("rng column 3 (step) must be in 0..2**24 - 1, got ", row[3], " in row ", i);
  }
}

void check_numel(int64_t numel) {
  // element / 4 is one 32-bit word of the counter
  if (numel < 0 || numel >> 34) fail("numel must be in 0..2**34 - 1, got ", numel);
}

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
  const int64_t n = z.size(0), row = z.size(1) * z.size(2), blocks = ceil_div(row, kBlock);
  if (rng.size(0) != n) fail("rng must have one row for each row of z, ", n, ", got ", rng.size(0));
  check_numel(row);
  if (!std::isfinite(lambda_)) fail("lambda_ must be finite, got ", lambda_);
  eqr::check_noise_scale(noise_scale);

  Tensor out = torch::stable::empty_like(z);
  Tensor diff_sq = torch::stable::new_empty(z, {z_prev ? n : 0}, ScalarType::Float);
  Tensor norm_sq = torch::stable::new_empty(z, {z_prev ? n : 0}, ScalarType::Float);
  std::vector<float> partial(z_prev ? size_t(n * 2 * blocks) : 0);
  const eqr::cpu::DampedUpdate a{
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
  eqr::cpu::isa();  // what it throws must not come from another thread, where the message is lost
  torch::stable::parallel_for(0, n * blocks, kGrain, [&](int64_t begin, int64_t end) {
    if (bf16)
      EQR_DISPATCH(damped_update<uint16_t>, a, begin, end);
    else
      EQR_DISPATCH(damped_update<float>, a, begin, end);
  });
  if (z_prev) {
    float* diff = diff_sq.mutable_data_ptr<float>();
    float* norm = norm_sq.mutable_data_ptr<float>();
    for (int64_t i = 0; i < n; ++i) {
      diff[i] = eqr::cpu::tree_sum(a.partial + 2 * i * blocks, blocks);
      norm[i] = eqr::cpu::tree_sum(a.partial + (2 * i + 1) * blocks, blocks);
    }
  }
  return {out, diff_sq, norm_sq};
}

template <class T, class Kernel>
Tensor fill_random(const Tensor& rng, int64_t stream, int64_t numel, ScalarType dtype, const Kernel& kernel) {
  check_rng(rng, stream);
  check_numel(numel);
  const int64_t n = rng.size(0), blocks = ceil_div(numel, kBlock);
  Tensor out = torch::stable::new_empty(rng, {n, numel}, dtype);
  const eqr::cpu::Philox a{rng.const_data_ptr<int64_t>(), numel, blocks, uint32_t(stream)};
  T* data = out.mutable_data_ptr<T>();
  eqr::cpu::isa();  // as in damped_update
  torch::stable::parallel_for(0, n * blocks, kGrain, [&](int64_t begin, int64_t end) { kernel(a, data, begin, end); });
  return out;
}

// rng: [n, 4] -> int64 [n, numel], 32-bit words
Tensor philox_words(const Tensor& rng, int64_t stream, int64_t numel) {
  const auto kernel = [](const eqr::cpu::Philox& a, int64_t* out, int64_t begin, int64_t end) {
    EQR_DISPATCH(philox_words, a, out, begin, end);
  };
  return fill_random<int64_t>(rng, stream, numel, ScalarType::Long, kernel);
}

// rng: [n, 4] -> float32 [n, numel], standard normals
Tensor philox_normal(const Tensor& rng, int64_t stream, int64_t numel) {
  const auto kernel = [](const eqr::cpu::Philox& a, float* out, int64_t begin, int64_t end) {
    EQR_DISPATCH(philox_normal, a, out, begin, end);
  };
  return fill_random<float>(rng, stream, numel, ScalarType::Float, kernel);
}

}  // namespace

STABLE_TORCH_LIBRARY(eqr_kernels, m) {
  m.def(
      "damped_update(Tensor z, Tensor u, Tensor rng, int stream, float lambda_, float noise_scale, "
      "Tensor? z_prev=None) -> (Tensor out, Tensor diff_sq, Tensor norm_sq)");
  m.def("philox_words(Tensor rng, int stream, int numel) -> Tensor");
  m.def("philox_normal(Tensor rng, int stream, int numel) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(eqr_kernels, CPU, m) {
  m.impl("damped_update", TORCH_BOX(&damped_update));
  m.impl("philox_words", TORCH_BOX(&philox_words));
  m.impl("philox_normal", TORCH_BOX(&philox_normal));
}
