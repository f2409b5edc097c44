// The packing of weights and the whole fixed-point loop as torch ops; see the head of ops.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
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
#include "operator_args.h"
#include "ops_checks.h"
#include "poll.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using eqr::check_tensor;
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

// Rounding and the treatment of denormals are each thread's own (torch.set_flush_denormal): without this, a result
// would depend on the thread that computes it.
class DefaultFloatingPoint {
 public:
  DefaultFloatingPoint() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatingPoint() { std::fesetenv(&before_); }
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
  DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;

 private:
  std::fenv_t before_;
};


// sizes and constants as in operator_args.h; all tensors float32 -> uint8 [bytes]
Tensor pack_weights(const Tensor& embedding, const Tensor& lm_head, const Tensor& q_weight, const Tensor& q_bias,
                    const std::vector<Tensor>& blocks, std::optional<Tensor> rope_cos, std::optional<Tensor> rope_sin,
                    std::optional<Tensor> H_start, std::optional<Tensor> L_start, std::vector<int64_t> sizes,
                    std::vector<double> constants, std::string precision) {
  const eqr::Shape s = eqr::shape_of(sizes, constants, bool(H_start));
  const eqr::Precision kind = eqr::precision_of(precision);
  const int64_t S = s.tokens, d = s.features, V = s.vocabulary;
  constexpr int64_t kMostSummed = 65536;  // products of two bytes, in an int32
  if (kind == eqr::Precision::int8 && (s.hidden > kMostSummed || d > kMostSummed))
    fail("precision 'int8' needs features and hidden of at most ", kMostSummed, ", got ", d, " and ", s.hidden,
         "; use 'bf16'");
  const auto data = [](const std::string& name, const Tensor& t, const std::vector<int64_t>& expected) {
    check_tensor(name, t, ScalarType::Float, expected);
    return t.const_data_ptr<float>();
  };
  const auto pair = [&](const char* name, const std::optional<Tensor>& t, const std::optional<Tensor>& twin,
                        const std::vector<int64_t>& expected) {
    if (bool(t) != bool(twin)) fail(name, " must come with its twin (rope_cos and rope_sin, H_start and L_start)");
    return t ? data(name, *t, expected) : nullptr;
  };
  if (int64_t(blocks.size()) != 4 * s.layers)
    fail("blocks must be 4 tensors (mixer_in, mixer_out, gate_up, down) for each of the ", s.layers, " layers, got ",
         blocks.size());
  if (bool(rope_cos) != bool(s.rope_parts))
    fail("rope_cos and rope_sin must be given where rope_parts is not 0, and only there, got rope_parts ",
         s.rope_parts);
  const std::vector<int64_t> mixer_in = s.heads ? std::vector{3 * d, d} : std::vector{2 * s.mixer_hidden, S};
  const std::vector<int64_t> mixer_out = s.heads ? std::vector{d, d} : std::vector{S, s.mixer_hidden};
  std::vector<eqr::BlockWeights> layers;
  for (int64_t i = 0; i < s.layers; ++i) {
    const auto part = [&](int64_t k, const std::vector<int64_t>& expected) {
      return data("blocks[" + std::to_string(4 * i + k) + "]", blocks[size_t(4 * i + k)], expected);
    };
    layers.push_back({.mixer_in = part(0, mixer_in),
                      .mixer_out = part(1, mixer_out),
                      .gate_up = part(2, {2 * s.hidden, d}),
                      .down = part(3, {d, s.hidden})});
  }
  const std::vector<int64_t> angles = {S, s.heads ? d / s.heads : 0};
  const eqr::OperatorWeights weights{
      .embedding = data("embedding", embedding, {V, d}),
      .lm_head = data("lm_head", lm_head, {V, d}),
      .q_weight = data("q_weight", q_weight, {2, d}),
      .q_bias = data("q_bias", q_bias, {2}),
      .blocks = layers.data(),
      .cos = pair("rope_cos", rope_cos, rope_sin, angles),
      .sin = pair("rope_sin", rope_sin, rope_cos, angles),
      .H_start = pair("H_start", H_start, L_start, {d}),
      .L_start = pair("L_start", L_start, H_start, {d}),
  };
  const DefaultFloatingPoint same_for_all;
  const eqr::cpu::Isa isa = eqr::cpu::isa();
  // Zeros, so that what lies between the parts is the same each time.
  Tensor packed = torch::stable::new_zeros(embedding, {eqr::cpu::packed_bytes(s, kind, isa)}, ScalarType::Byte);
  packed_data(packed);
  eqr::cpu::pack(s, kind, isa, weights, static_cast<eqr::cpu::Packed*>(packed.mutable_data_ptr()));
  return packed;
}

template <class Choice>
Choice choice(const char* name, const std::string& value,
              std::initializer_list<std::pair<const char*, Choice>> allowed) {
  std::string names;
  for (const auto& [text, result] : allowed) {
    if (value == text) return result;
    names += (names.empty() ? "" : ", ") + std::string(text);
  }
  fail(name, " must be one of ", names, ", got '", value, "'");
}

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) fail(name, " must be in ", low, "..", high, ", got ", value);
}

void check_tokens(const int64_t* tokens, int64_t n, int64_t S, int64_t V) {
  for (int64_t i = 0; i < n * S; ++i)
    if (tokens[i] < 0 || tokens[i] >= V) fail("tokens must be in 0..", V - 1, ", got ", tokens[i], " in row ", i / S);
}

struct Recording {  // of T trajectories of S tokens, at C checkpoints (or once, without that dimension)
  Tensor preds, q_halt, residual, score, steps, status;

  Recording(const Tensor& like, std::vector<int64_t> sizes, int64_t S) {
    const auto make = [&](ScalarType dtype) { return torch::stable::new_empty(like, sizes, dtype); };
    q_halt = make(ScalarType::Float), residual = make(ScalarType::Float), score = make(ScalarType::Float);
    steps = make(ScalarType::Long), status = make(ScalarType::Long);
    sizes.push_back(S);
    preds = make(ScalarType::Long);
  }

  // Those of checkpoint c of `trajectories` each.
  eqr::Records records(int64_t c, int64_t trajectories, int64_t S) const {
    const int64_t skip = c * trajectories;
    return {.preds = preds.mutable_data_ptr<int64_t>() + skip * S,
            .q_halt = q_halt.mutable_data_ptr<float>() + skip,
            .residual = residual.mutable_data_ptr<float>() + skip,
            .score = score.mutable_data_ptr<float>() + skip,
            .steps = steps.mutable_data_ptr<int64_t>() + skip,
            .status = status.mutable_data_ptr<int64_t>() + skip};
  }
};

using FixedPointResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                    Tensor, Tensor, Tensor, Tensor, Tensor>;

// packed: uint8 [bytes], tokens: int64 [N, S], ids: int64 [N], control: int64 [3]; T = N * breadth, C checkpoints ->
// logits float32 [N, S, V], winner int64 [N], preds int64 [T, S], q_halt, residual, score float32 [T], steps, status
// int64 [T], the same six with [C, ...] at the checkpoints, residuals float32 [T, depth] or [0]
FixedPointResult fixed_point(const Tensor& packed, const Tensor& tokens, const Tensor& ids, const Tensor& control,
                             int64_t vocabulary, int64_t seed, int64_t breadth, int64_t depth, std::string halt,
                             double tol, int64_t patience, std::string select, int64_t window, double noise_scale,
                             std::vector<int64_t> checkpoints, int64_t slots, bool trace) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  const eqr::cpu::Engine engine = eqr::cpu::engine(packed_data(packed), packed.numel());
  const int64_t S = engine.tokens, V = engine.vocabulary;
  if (vocabulary != V) fail("vocabulary must be that of the packed weights, ", V, ", got ", vocabulary);
  if (tokens.dim() != 2) fail("tokens must be a contiguous int64 tensor [N, ", S, "], got shape ", shape(tokens));
  const int64_t N = tokens.size(0);
  check_tensor("tokens", tokens, ScalarType::Long, {N, S});
  check_tensor("ids", ids, ScalarType::Long, {N});
  check_tensor("control", control, ScalarType::Long, {3});
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  check_tokens(token, N, S, V);
  check_range("seed", seed, 0, (int64_t{1} << 32) - 1);
  check_range("breadth", breadth, 1, (int64_t{1} << 32) - 1);
  check_range("depth", depth, 1, (int64_t{1} << 24) - 1);
  check_range("patience", patience, 1, kMost);
  check_range("window", window, 1, kMost);
  check_range("slots", slots, 1, kMost);
  if (N > (int64_t{1} << 40) / breadth) fail("N * breadth must be at most 2**40, got ", N, " * ", breadth);
  if (!(tol >= 0)) fail("tol must be at least 0, got ", tol);
  eqr::check_noise_scale(noise_scale);
  for (size_t i = 0; i < checkpoints.size(); ++i)
    if (checkpoints[i] < 1 || checkpoints[i] > depth || (i && checkpoints[i] <= checkpoints[i - 1]))
      fail("checkpoints must rise and be in 1..depth=", depth, ", got ", eqr::list(checkpoints));
  const Halt rule = choice<Halt>("halt", halt, {{"residual", Halt::residual}, {"q", Halt::q}, {"none", Halt::none}});
  const Select selection = choice<Select>("select", select, {{"residual", Select::residual}, {"vote", Select::vote},
                                                             {"q", Select::q}, {"first", Select::first}});
  if (selection == Select::first && rule == Halt::none)
    fail("select='first' needs a halting rule, got halt='none'; use halt='residual' or halt='q'");

  const int64_t T = N * breadth, C = int64_t(checkpoints.size());
  Tensor logits = torch::stable::new_empty(tokens, {N, S, V}, ScalarType::Float);
  Tensor winner = torch::stable::new_empty(tokens, {N}, ScalarType::Long);
  const Recording end(tokens, {T}, S), at(tokens, {C, T}, S);
  const std::vector<int64_t> traced = trace ? std::vector{T, depth} : std::vector{int64_t{0}};
  Tensor residuals = torch::stable::new_empty(tokens, traced, ScalarType::Float);
  std::fill_n(residuals.mutable_data_ptr<float>(), residuals.numel(), std::numeric_limits<float>::quiet_NaN());
  std::vector<eqr::Records> at_records;
  for (int64_t c = 0; c < C; ++c) at_records.push_back(at.records(c, T, S));
  const eqr::cpu::FixedPoint problem{
      .engine = engine,
      .puzzles = N,
      .breadth = breadth,
      .depth = depth,
      .tokens = token,
      .ids = ids.const_data_ptr<int64_t>(),
      .seed = seed,
      .halt = rule,
      .tol = float(tol),
      .patience = patience,
      .select = selection,
      .window = std::min(window, depth),  // an older difference does not exist
      .noise_scale = float(noise_scale),
      .checkpoints = checkpoints.data(),
      .checkpoint_count = C,
      .slots = slots,
      .end = end.records(0, T, S),
      .at = at_records.data(),
      .residuals = trace ? residuals.mutable_data_ptr<float>() : nullptr,
      .winner = winner.mutable_data_ptr<int64_t>(),
      .logits = logits.mutable_data_ptr<float>(),
      .control = control.mutable_data_ptr<int64_t>(),
  };
  const int workers = int(torch::stable::get_num_threads());
  eqr::cpu::FixedPointRun run(problem, workers);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const DefaultFloatingPoint same_for_all;
    run.work(eqr::poll);
  });
  run.finish();
  return {logits,  winner,      end.preds,   end.q_halt, end.residual, end.score, end.steps, end.status,
          at.preds, at.q_halt, at.residual, at.score,   at.steps,     at.status, residuals};
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
  check_tokens(token, n, S, V);
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
                     {.tokens = token + i * S, .count = count, .z_H = H + i * row, .z_L = L + i * row,
                      .eps = noise ? noise + i * row : nullptr, .eps_stride = n * row,
                      .noise_scale = float(noise_scale)});
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
  m.def("pack_weights(Tensor embedding, Tensor lm_head, Tensor q_weight, Tensor q_bias, Tensor[] blocks, "
        "Tensor? rope_cos, Tensor? rope_sin, Tensor? H_start, Tensor? L_start, int[] sizes, float[] constants, "
        "str precision) -> Tensor");
  m.def("fixed_point(Tensor packed, Tensor tokens, Tensor ids, Tensor(a!) control, int vocabulary, int seed, "
        "int breadth, int depth, str halt, float tol, int patience, str select, int window, float noise_scale, "
        "int[] checkpoints, int slots, bool trace) -> (Tensor logits, Tensor winner, Tensor preds, Tensor q_halt, "
        "Tensor residual, Tensor score, Tensor steps, Tensor status, Tensor at_preds, Tensor at_q_halt, "
        "Tensor at_residual, Tensor at_score, Tensor at_steps, Tensor at_status, Tensor residuals)");
  m.def("latent_recursions(Tensor packed, Tensor tokens, Tensor z_H, Tensor z_L, Tensor? eps, float noise_scale, "
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
