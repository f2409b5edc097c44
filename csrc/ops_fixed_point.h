// What the ops pack_weights and fixed_point are on every device: the checks of their arguments, and their results.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "operator.h"
#include "operator_args.h"
#include "ops_checks.h"
#include "records.h"

namespace eqr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The arguments of pack_weights.
struct OperatorTensors {
  Shape shape;
  Precision precision;
  std::vector<BlockWeights> layers;
  OperatorWeights weights;  // but `blocks`, which is layers.data()
};

// sizes and constants as in operator_args.h; all tensors float32 and where `embedding` is
inline OperatorTensors operator_tensors(const Tensor& embedding, const Tensor& lm_head, const Tensor& q_weight,
                                        const Tensor& q_bias, const std::vector<Tensor>& blocks,
                                        const std::optional<Tensor>& rope_cos, const std::optional<Tensor>& rope_sin,
                                        const std::optional<Tensor>& H_start, const std::optional<Tensor>& L_start,
                                        const std::vector<int64_t>& sizes, const std::vector<double>& constants,
                                        const std::string& precision) {
  OperatorTensors out{.shape = shape_of(sizes, constants, bool(H_start)),
                      .precision = precision_of(precision),
                      .layers = {},
                      .weights = {}};
  const Shape& s = out.shape;
  const int64_t S = s.tokens, d = s.features, V = s.vocabulary;
  const Place place = place_of(embedding);
  const auto data = [&](const std::string& name, const Tensor& t, const std::vector<int64_t>& expected) {
    check_tensor(name, t, ScalarType::Float, expected, place);
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
  for (int64_t i = 0; i < s.layers; ++i) {
    const auto part = [&](int64_t k, const std::vector<int64_t>& expected) {
      return data("blocks[" + std::to_string(4 * i + k) + "]", blocks[size_t(4 * i + k)], expected);
    };
    out.layers.push_back({.mixer_in = part(0, mixer_in),
                          .mixer_out = part(1, mixer_out),
                          .gate_up = part(2, {2 * s.hidden, d}),
                          .down = part(3, {d, s.hidden})});
  }
  const std::vector<int64_t> angles = {S, s.heads ? d / s.heads : 0};
  out.weights = {
      .embedding = data("embedding", embedding, {V, d}),
      .lm_head = data("lm_head", lm_head, {V, d}),
      .q_weight = data("q_weight", q_weight, {2, d}),
      .q_bias = data("q_bias", q_bias, {2}),
      .blocks = nullptr,
      .cos = pair("rope_cos", rope_cos, rope_sin, angles),
      .sin = pair("rope_sin", rope_sin, rope_cos, angles),
      .H_start = pair("H_start", H_start, L_start, {d}),
      .L_start = pair("L_start", L_start, H_start, {d}),
  };
  return out;
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

inline void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) fail(name, " must be in ", low, "..", high, ", got ", value);
}

// A run as fixed_point is asked for it, checked.
struct RunArguments {
  const Tensor& tokens;  // int64 [N, S]
  const Tensor& ids;     // int64 [N]
  int64_t seed, breadth, depth, patience, window, slots;
  double tol, noise_scale;
  Halt halt;
  Select select;
  const std::vector<int64_t>& checkpoints;

  RunArguments(const Tensor& tokens, const Tensor& ids, const Shape& shape, int64_t seed, int64_t breadth,
               int64_t depth, const std::string& halt, double tol, int64_t patience, const std::string& select,
               int64_t window, double noise_scale, const std::vector<int64_t>& checkpoints, int64_t slots)
      : tokens(tokens),
        ids(ids),
        seed(seed),
        breadth(breadth),
        depth(depth),
        patience(patience),
        window(window),
        slots(slots),
        tol(tol),
        noise_scale(noise_scale),
        halt(choice<Halt>("halt", halt, {{"residual", Halt::residual}, {"q", Halt::q}, {"none", Halt::none}})),
        select(choice<Select>(
            "select", select,
            {{"residual", Select::residual}, {"vote", Select::vote}, {"q", Select::q}, {"first", Select::first}})),
        checkpoints(checkpoints) {
    constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
    const int64_t S = shape.tokens;
    if (tokens.dim() != 2)
      fail("tokens must be a contiguous int64 tensor [N, ", S, "], got shape ", eqr::shape(tokens));
    const Place place = place_of(tokens);
    check_tensor("tokens", tokens, ScalarType::Long, {puzzles(), S}, place);
    check_tensor("ids", ids, ScalarType::Long, {puzzles()}, place);
    check_range("seed", seed, 0, (int64_t{1} << 32) - 1);
    check_range("breadth", breadth, 1, (int64_t{1} << 32) - 1);
    check_range("depth", depth, 1, (int64_t{1} << 24) - 1);
    check_range("patience", patience, 1, kMost);
    check_range("window", window, 1, kMost);
    check_range("slots", slots, 1, kMost);
    if (puzzles() > (int64_t{1} << 40) / breadth)
      fail("N * breadth must be at most 2**40, got ", puzzles(), " * ", breadth);
    if (!(tol >= 0)) fail("tol must be at least 0, got ", tol);
    check_noise_scale(noise_scale);
    for (size_t i = 0; i < checkpoints.size(); ++i)
      if (checkpoints[i] < 1 || checkpoints[i] > depth || (i && checkpoints[i] <= checkpoints[i - 1]))
        fail("checkpoints must rise and be in 1..depth=", depth, ", got ", list(checkpoints));
    if (this->select == Select::first && this->halt == Halt::none)
      fail("select='first' needs a halting rule, got halt='none'; use halt='residual' or halt='q'");
  }

  int64_t puzzles() const { return tokens.size(0); }
  int64_t trajectories() const { return puzzles() * breadth; }
};

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
  Records records(int64_t c, int64_t trajectories, int64_t S) const {
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

// What fixed_point gives, where the tokens are. T = N * breadth, C checkpoints.
struct RunResults {
  Tensor logits;     // float32 [N, S, V]
  Tensor winner;     // int64 [N]
  Recording end;     // [T]
  Recording at;      // [C, T]
  Tensor residuals;  // float32 [T, depth], NaN so far, or [0]

  RunResults(const RunArguments& run, const Shape& s, bool trace)
      : logits(torch::stable::new_empty(run.tokens, {run.puzzles(), s.tokens, s.vocabulary}, ScalarType::Float)),
        winner(torch::stable::new_empty(run.tokens, {run.puzzles()}, ScalarType::Long)),
        end(run.tokens, {run.trajectories()}, s.tokens),
        at(run.tokens, {int64_t(run.checkpoints.size()), run.trajectories()}, s.tokens),
        residuals(torch::stable::new_empty(run.tokens,
                                           trace ? std::vector{run.trajectories(), run.depth} : std::vector{int64_t{0}},
                                           ScalarType::Float)) {
    torch::stable::fill_(residuals, std::numeric_limits<double>::quiet_NaN());
  }

  FixedPointResult all() const {
    return {logits,   winner,    end.preds,   end.q_halt, end.residual, end.score, end.steps, end.status,
            at.preds, at.q_halt, at.residual, at.score,   at.steps,     at.status, residuals};
  }
};

}  // namespace eqr
