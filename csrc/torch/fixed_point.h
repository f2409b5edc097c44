// What the op fixed_point is on every device: the checks of its arguments, and its results.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/operator.h"
#include "common/run_rules.h"
#include "torch/checks.h"
#include "torch/operator_args.h"

namespace eqr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Where the trajectories of a run start, and what they draw their noise from. T trajectories.
struct StartStates {
  Tensor z_H, z_L;  // float32 [T, S, d]
  Tensor rng;       // int64 [T, 4]
};

// After every so many outer steps the cells of each of N puzzles move to the next of V arrangements.
struct TurnCells {
  Tensor cells;  // int64 [N, V, S], the puzzle's cell that each cell shows
  int64_t every;
};

// A run as fixed_point is asked for it.
struct RunArguments {
  const Tensor& packed;   // uint8 [bytes]
  const Tensor& tokens;   // int64 [N, S]
  const Tensor& ids;      // int64 [N]
  const Tensor& control;  // int64 [3]
  Shape shape;            // of the operator that was packed
  RunRules rules;
  std::vector<int64_t> checkpoints;
  int64_t slots;
  bool trace;
  std::optional<StartStates> start;
  bool keep_states;
  std::optional<TurnCells> turns;

  int64_t puzzles() const { return tokens.size(0); }
  int64_t trajectories() const { return puzzles() * rules.breadth; }

  // All but `packed` and `control`, which are for the device to check.
  void check() const {
    constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
    const int64_t S = shape.tokens;
    const auto& [seed, breadth, depth, halt, tol, patience, select, window, noise_scale] = rules;
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
    if (start) {
      const int64_t T = trajectories();
      check_tensor("start_H", start->z_H, ScalarType::Float, {T, S, shape.features}, place);
      check_tensor("start_L", start->z_L, ScalarType::Float, {T, S, shape.features}, place);
      check_tensor("start_rng", start->rng, ScalarType::Long, {T, 4}, place);
    }
    if (turns) {
      const int64_t count = turns->cells.dim() == 3 ? turns->cells.size(1) : 0;
      if (count < 1)
        fail("turn_cells must be a contiguous int64 tensor [N, V >= 1, S], got shape ", eqr::shape(turns->cells));
      check_tensor("turn_cells", turns->cells, ScalarType::Long, {puzzles(), count, S}, place);
      check_range("turn_every", turns->every, 1, kMost);
      if (keep_states) fail("keep_states must be False with turn_cells, as a state would be of cells that have moved");
    }
    if (is_race(rules) && halt == Halt::none)
      fail("select='first' needs a halting rule, got halt='none'; use halt='residual' or halt='q'");
  }
};

inline Halt halt_named(const std::string& name) {
  return choice<Halt>("halt", name,
                      {{"residual", Halt::residual},
                       {"q", Halt::q},
                       {"residual+q", Halt::residual_and_q},
                       {"residual|q", Halt::residual_or_q},
                       {"none", Halt::none}});
}

// In the order of the op's schema.
inline RunArguments run_arguments(const Tensor& packed, const Tensor& tokens, const Tensor& ids, const Tensor& control,
                                  const std::vector<int64_t>& sizes, const std::vector<double>& constants,
                                  bool fixed_start, int64_t seed, int64_t breadth, int64_t depth,
                                  const std::string& halt, double tol, int64_t patience, const std::string& select,
                                  int64_t window, double noise_scale, std::vector<int64_t> checkpoints, int64_t slots,
                                  bool trace, const std::optional<Tensor>& start_H,
                                  const std::optional<Tensor>& start_L, const std::optional<Tensor>& start_rng,
                                  bool keep_states, const std::optional<Tensor>& turn_cells, int64_t turn_every) {
  if (turn_cells.has_value() != (turn_every != 0))
    fail("turn_every must be at least 1 with turn_cells, and 0 without, got ", turn_every);
  if (start_H.has_value() != start_L.has_value() || start_H.has_value() != start_rng.has_value())
    fail("start_H, start_L and start_rng must all be given or all be None");
  return {.packed = packed,
          .tokens = tokens,
          .ids = ids,
          .control = control,
          .shape = shape_of(sizes, constants, fixed_start),
          .rules = {.seed = seed,
                    .breadth = breadth,
                    .depth = depth,
                    .halt = halt_named(halt),
                    .tol = float(tol),
                    .patience = patience,
                    .select = choice<Select>("select", select,
                                             {{"residual", Select::residual},
                                              {"vote", Select::vote},
                                              {"q", Select::q},
                                              {"first", Select::first}}),
                    .window = window,
                    .noise_scale = float(noise_scale)},
          .checkpoints = std::move(checkpoints),
          .slots = slots,
          .trace = trace,
          .start = start_H ? std::optional<StartStates>({*start_H, *start_L, *start_rng}) : std::nullopt,
          .keep_states = keep_states,
          .turns = turn_cells ? std::optional<TurnCells>({*turn_cells, turn_every}) : std::nullopt};
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
                                    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What fixed_point gives, where the tokens are. T = N * breadth, C checkpoints.
struct RunResults {
  Tensor logits;     // float32 [N, S, V]
  Tensor winner;     // int64 [N]
  Recording end;     // [T]
  Recording at;      // [C, T]
  Tensor residuals;  // float32 [T, depth], NaN so far, or [0]
  Tensor z_H, z_L;   // float32 [N, S, d], or [0]

  explicit RunResults(const RunArguments& run)
      : logits(torch::stable::new_empty(run.tokens, {run.puzzles(), run.shape.tokens, run.shape.vocabulary},
                                        ScalarType::Float)),
        winner(torch::stable::new_empty(run.tokens, {run.puzzles()}, ScalarType::Long)),
        end(run.tokens, {run.trajectories()}, run.shape.tokens),
        at(run.tokens, {int64_t(run.checkpoints.size()), run.trajectories()}, run.shape.tokens),
        residuals(torch::stable::new_empty(
            run.tokens, run.trace ? std::vector{run.trajectories(), run.rules.depth} : std::vector{int64_t{0}},
            ScalarType::Float)),
        z_H(states(run)),
        z_L(states(run)) {
    torch::stable::fill_(residuals, std::numeric_limits<double>::quiet_NaN());
  }

  FixedPointResult all() const {
    return {logits,    winner,      end.preds, end.q_halt, end.residual, end.score, end.steps, end.status, at.preds,
            at.q_halt, at.residual, at.score,  at.steps,   at.status,    residuals, z_H,       z_L};
  }

 private:
  static Tensor states(const RunArguments& run) {
    const std::vector<int64_t> sizes{run.puzzles(), run.shape.tokens, run.shape.features};
    return torch::stable::new_empty(run.tokens, run.keep_states ? sizes : std::vector{int64_t{0}}, ScalarType::Float);
  }
};

FixedPointResult fixed_point_on_cpu(const RunArguments&);
FixedPointResult fixed_point_on_cuda(const RunArguments&);  // of a build with CUDA kernels

}  // namespace eqr
