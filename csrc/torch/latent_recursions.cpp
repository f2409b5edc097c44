// The recursions of an outer step that carry no gradient, as a torch op.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/loop/workspace.h"
#include "torch/checks.h"
#include "torch/floating_point.h"
#include "torch/packed.h"

namespace eqr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// packed: uint8 [bytes], tokens: int64 [n, S], z_H and z_L: float32 [n, S, d], eps: float32 [U, n, S, d] or null ->
// z_H and z_L after `count` latent recursions, of L_cycles + 1 updates each
std::tuple<Tensor, Tensor> latent_recursions(const Tensor& packed, const Tensor& tokens, const Tensor& z_H,
                                             const Tensor& z_L, std::optional<Tensor> eps, double noise_scale,
                                             int64_t count) {
  const cpu::Engine engine = cpu::engine_of(packed);
  const int64_t S = engine.tokens, V = engine.vocabulary, d = engine.shape->features;
  if (tokens.dim() != 2) fail("tokens must be a contiguous int64 tensor [n, ", S, "], got shape ", shape(tokens));
  const int64_t n = tokens.size(0), row = S * d;
  check_tensor("tokens", tokens, ScalarType::Long, {n, S});
  check_tensor("z_H", z_H, ScalarType::Float, {n, S, d});
  check_tensor("z_L", z_L, ScalarType::Float, {n, S, d});
  check_range("count", count, 0, 254);
  const int64_t updates = count * (engine.shape->L_cycles + 1);
  if (eps) {
    if (eps->dim() != 4 || eps->size(0) < updates)
      fail("eps must be a contiguous float32 tensor [at least ", updates, ", ", n, ", ", S, ", ", d, "], got shape ",
           shape(*eps));
    check_tensor("eps", *eps, ScalarType::Float, {eps->size(0), n, S, d});
  }
  check_noise_scale(noise_scale);
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  check_tokens("tokens", token, n, S, V);
  Tensor new_H = torch::stable::empty_like(z_H), new_L = torch::stable::empty_like(z_L);
  float *H = new_H.mutable_data_ptr<float>(), *L = new_L.mutable_data_ptr<float>();
  std::copy_n(z_H.const_data_ptr<float>(), n * row, H);
  std::copy_n(z_L.const_data_ptr<float>(), n * row, L);
  const float* noise = eps ? eps->const_data_ptr<float>() : nullptr;
  const int workers = int(torch::stable::get_num_threads());
  std::vector<cpu::Workspace> workspaces;
  for (int i = 0; i < std::min<int64_t>(workers, n); ++i) workspaces.emplace_back(engine.workspace_bytes);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, int64_t(workspaces.size()), 1, [&](int64_t begin, int64_t end) {
    const DefaultFloatingPoint same_for_all;
    for (int64_t w = begin; w < end; ++w) {
      cpu::Workspace& workspace = workspaces[size_t(w)];
      workspace.clear();
      for (int64_t i; (i = next++) < n;)
        engine.recur(engine.packed, workspace.data(),
                     {.tokens = token + i * S,
                      .count = count,
                      .z_H = H + i * row,
                      .z_L = L + i * row,
                      .eps = noise ? noise + i * row : nullptr,
                      .eps_stride = n * row,
                      .noise_scale = float(noise_scale),
                      .rng = nullptr});
    }
  });
  return {new_H, new_L};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eqr_kernels, m) {
  m.def(
      "latent_recursions(Tensor packed, Tensor tokens, Tensor z_H, Tensor z_L, Tensor? eps, float noise_scale, "
      "int count) -> (Tensor new_H, Tensor new_L)");
}

STABLE_TORCH_LIBRARY_IMPL(eqr_kernels, CPU, m) { m.impl("latent_recursions", TORCH_BOX(&latent_recursions)); }

}  // namespace eqr
