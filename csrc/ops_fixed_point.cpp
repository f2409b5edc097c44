// The packing of weights and the whole fixed-point loop as torch ops: their schemas, and what they do on CPU; see the
// head of ops.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/fingerprint.h"
#include "cpu/fixed_point.h"
#include "cpu/isa.h"
#include "cpu/operator.h"
#include "cpu/workspace.h"
#include "ops_checks.h"
#include "ops_cpu.h"
#include "ops_fixed_point.h"
#include "poll.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using eqr::check_range;
using eqr::check_tensor;
using eqr::check_tokens;
using eqr::DefaultFloatingPoint;
using eqr::fail;
using eqr::shape;

const eqr::cpu::Packed* packed_data(const Tensor& packed) {
  if (!packed.is_cpu() || packed.scalar_type() != ScalarType::Byte || packed.dim() != 1 || !packed.is_contiguous())
    fail("packed must be a contiguous uint8 tensor [bytes] on CPU, got ", eqr::dtype_name(packed.scalar_type()), " ",
         shape(packed), "; make it with pack_weights");
  const void* data = packed.const_data_ptr();
  if (reinterpret_cast<uintptr_t>(data) % 64)
    fail("packed must lie at a multiple of 64 bytes, and this view of it does not; use packed.clone()");
  return static_cast<const eqr::cpu::Packed*>(data);
}

// all tensors float32 -> uint8 [bytes]
Tensor pack_weights(const Tensor& embedding, const Tensor& lm_head, const Tensor& q_weight, const Tensor& q_bias,
                    const std::vector<Tensor>& blocks, std::optional<Tensor> rope_cos, std::optional<Tensor> rope_sin,
                    std::optional<Tensor> H_start, std::optional<Tensor> L_start, std::vector<int64_t> sizes,
                    std::vector<double> constants, std::string precision, std::string /* layout: on CUDA */) {
  eqr::OperatorTensors given = eqr::operator_tensors(embedding, lm_head, q_weight, q_bias, blocks, rope_cos, rope_sin,
                                                     H_start, L_start, sizes, constants, precision);
  given.weights.blocks = given.layers.data();
  const eqr::Shape& s = given.shape;
  constexpr int64_t kMostSummed = 65536;  // products of two bytes, in an int32
  if (given.precision == eqr::Precision::int8 && (s.hidden > kMostSummed || s.features > kMostSummed))
    fail("precision 'int8' needs features and hidden of at most ", kMostSummed, ", got ", s.features, " and ", s.hidden,
         "; use 'bf16'");
  const DefaultFloatingPoint same_for_all;
  const eqr::cpu::Isa isa = eqr::cpu::isa();
  // Zeros, so that what lies between the parts is the same each time.
  Tensor packed =
      torch::stable::new_zeros(embedding, {eqr::cpu::packed_bytes(s, given.precision, isa)}, ScalarType::Byte);
  packed_data(packed);
  eqr::cpu::pack(s, given.precision, isa, given.weights, static_cast<eqr::cpu::Packed*>(packed.mutable_data_ptr()));
  return packed;
}

// The packed weights know their operator; a caller that names another one is mistaken about what it gets.
void check_operator(const eqr::Shape& given, const eqr::Shape& packed) {
  const auto integers = [](const eqr::Shape& s) {
    return std::vector{s.tokens, s.features, s.vocabulary, s.mixer_hidden, s.hidden,
                       s.heads,  s.layers,   s.H_cycles,   s.L_cycles,     s.rope_parts};
  };
  const auto numbers = [](const eqr::Shape& s) { return std::vector{s.lambda, s.norm_eps, s.H_std, s.L_std}; };
  if (integers(given) != integers(packed))
    fail("sizes must be those of the packed weights, ", eqr::list(integers(packed)), ", got ",
         eqr::list(integers(given)));
  if (numbers(given) != numbers(packed))
    fail("constants must be those of the packed weights, ", eqr::list(numbers(packed)), ", got ",
         eqr::list(numbers(given)));
  if (given.fixed_start != packed.fixed_start)
    fail("fixed_start must be that of the packed weights, ", packed.fixed_start, ", got ", given.fixed_start);
}

// packed: uint8 [bytes], tokens: int64 [N, S], ids: int64 [N], control: int64 [3]; T = N * breadth, C checkpoints ->
// logits float32 [N, S, V], winner int64 [N], preds int64 [T, S], q_halt, residual, score float32 [T], steps, status
// int64 [T], the same six with [C, ...] at the checkpoints, residuals float32 [T, depth] or [0]
eqr::FixedPointResult fixed_point(const Tensor& packed, const Tensor& tokens, const Tensor& ids, const Tensor& control,
                                  std::vector<int64_t> sizes, std::vector<double> constants, bool fixed_start,
                                  int64_t seed, int64_t breadth, int64_t depth, std::string halt, double tol,
                                  int64_t patience, std::string select, int64_t window, double noise_scale,
                                  std::vector<int64_t> checkpoints, int64_t slots, bool trace) {
  const eqr::cpu::Engine engine = eqr::cpu::engine(packed_data(packed), packed.numel());
  const eqr::Shape& s = *engine.shape;
  check_operator(eqr::shape_of(sizes, constants, fixed_start), s);
  const int64_t S = s.tokens;
  const eqr::RunArguments run(tokens, ids, s, seed, breadth, depth, halt, tol, patience, select, window, noise_scale,
                              checkpoints, slots);
  check_tensor("control", control, ScalarType::Long, {3});
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  check_tokens("tokens", token, run.puzzles(), S, s.vocabulary);

  const int64_t T = run.trajectories(), C = int64_t(checkpoints.size());
  const eqr::RunResults results(run, s, trace);
  std::vector<eqr::Records> at_records;
  for (int64_t c = 0; c < C; ++c) at_records.push_back(results.at.records(c, T, S));
  const eqr::cpu::FixedPoint problem{
      .engine = engine,
      .puzzles = run.puzzles(),
      .breadth = breadth,
      .depth = depth,
      .tokens = token,
      .ids = ids.const_data_ptr<int64_t>(),
      .seed = seed,
      .halt = run.halt,
      .tol = float(tol),
      .patience = patience,
      .select = run.select,
      .window = std::min(window, depth),  // an older difference does not exist
      .noise_scale = float(noise_scale),
      .checkpoints = checkpoints.data(),
      .checkpoint_count = C,
      .slots = slots,
      .end = results.end.records(0, T, S),
      .at = at_records.data(),
      .residuals = trace ? results.residuals.mutable_data_ptr<float>() : nullptr,
      .winner = results.winner.mutable_data_ptr<int64_t>(),
      .logits = results.logits.mutable_data_ptr<float>(),
      .control = control.mutable_data_ptr<int64_t>(),
  };
  const int workers = int(torch::stable::get_num_threads());
  eqr::cpu::FixedPointRun team(problem, workers);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const DefaultFloatingPoint same_for_all;
    team.work(eqr::poll);
  });
  team.finish();
  return results.all();
}

// packed: uint8 [bytes], tokens: int64 [n, S], z_H and z_L: float32 [n, S, d], eps: float32 [U, n, S, d] or null ->
// z_H and z_L after `count` latent recursions, of L_cycles + 1 updates each
std::tuple<Tensor, Tensor> latent_recursions(const Tensor& packed, const Tensor& tokens, const Tensor& z_H,
                                             const Tensor& z_L, std::optional<Tensor> eps, double noise_scale,
                                             int64_t count) {
  const eqr::cpu::Engine engine = eqr::cpu::engine(packed_data(packed), packed.numel());
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
  eqr::check_noise_scale(noise_scale);
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  check_tokens("tokens", token, n, S, V);
  Tensor new_H = torch::stable::empty_like(z_H), new_L = torch::stable::empty_like(z_L);
  float *H = new_H.mutable_data_ptr<float>(), *L = new_L.mutable_data_ptr<float>();
  std::copy_n(z_H.const_data_ptr<float>(), n * row, H);
  std::copy_n(z_L.const_data_ptr<float>(), n * row, L);
  const float* noise = eps ? eps->const_data_ptr<float>() : nullptr;
  const int workers = int(torch::stable::get_num_threads());
  std::vector<eqr::cpu::Workspace> workspaces;
  for (int i = 0; i < std::min<int64_t>(workers, n); ++i) workspaces.emplace_back(engine.workspace_bytes);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, int64_t(workspaces.size()), 1, [&](int64_t begin, int64_t end) {
    const DefaultFloatingPoint same_for_all;
    for (int64_t w = begin; w < end; ++w) {
      eqr::cpu::Workspace& workspace = workspaces[size_t(w)];
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

// Numbers come as tensors: an int that depends on data is nothing that torch.compile can trace.
Tensor number(const Tensor& like, int64_t value) {
  Tensor result = torch::stable::new_empty(like, {}, ScalarType::Long);
  *result.mutable_data_ptr<int64_t>() = value;
  return result;
}

// packed: uint8 [bytes] -> int64 []: bytes that a trajectory in flight takes
Tensor trajectory_bytes(const Tensor& packed, int64_t window) {
  check_range("window", window, 1, (int64_t{1} << 24) - 1);
  eqr::cpu::FixedPoint problem{};
  problem.engine = eqr::cpu::engine(packed_data(packed), packed.numel());
  problem.window = problem.depth = window;  // a run as deep as the window at least
  return number(packed, eqr::cpu::FixedPointRun::bytes_per_trajectory(problem));
}

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
    hash = eqr::cpu::fingerprint(about.data(), int64_t(about.size() * sizeof(int64_t)), hash);
    hash = eqr::cpu::fingerprint(t.const_data_ptr(), t.numel() * int64_t(t.element_size()), hash);
  }
  return number(tensors[0], int64_t(hash));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eqr_kernels, m) {
  m.def(
      "pack_weights(Tensor embedding, Tensor lm_head, Tensor q_weight, Tensor q_bias, Tensor[] blocks, "
      "Tensor? rope_cos, Tensor? rope_sin, Tensor? H_start, Tensor? L_start, int[] sizes, float[] constants, "
      "str precision, str layout=\"\") -> Tensor");
  m.def(
      "fixed_point(Tensor packed, Tensor tokens, Tensor ids, Tensor(a!) control, int[] sizes, "
      "float[] constants, bool fixed_start, int seed, int breadth, int depth, str halt, float tol, int patience, "
      "str select, int window, float noise_scale, int[] checkpoints, int slots, bool trace) -> (Tensor logits, "
      "Tensor winner, Tensor preds, Tensor q_halt, Tensor residual, Tensor score, Tensor steps, Tensor status, "
      "Tensor at_preds, Tensor at_q_halt, Tensor at_residual, Tensor at_score, Tensor at_steps, Tensor at_status, "
      "Tensor residuals)");
  m.def(
      "latent_recursions(Tensor packed, Tensor tokens, Tensor z_H, Tensor z_L, Tensor? eps, float noise_scale, "
      "int count) -> (Tensor new_H, Tensor new_L)");
  m.def("trajectory_bytes(Tensor packed, int window) -> Tensor");
  m.def("fingerprint(Tensor[] tensors) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(eqr_kernels, CPU, m) {
  m.impl("pack_weights", TORCH_BOX(&pack_weights));
  m.impl("fixed_point", TORCH_BOX(&fixed_point));
  m.impl("latent_recursions", TORCH_BOX(&latent_recursions));
  m.impl("trajectory_bytes", TORCH_BOX(&trajectory_bytes));
  m.impl("fingerprint", TORCH_BOX(&fingerprint));
}
