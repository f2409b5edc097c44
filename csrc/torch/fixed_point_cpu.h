// The arguments of fixed_point as the loop on CPU takes them.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/loop/fixed_point.h"
#include "torch/fixed_point.h"
#include "torch/packed.h"

namespace eqr::cpu {

// The packed weights know their operator; a caller that names another one is mistaken about what it gets.
inline void check_operator(const Shape& given, const Shape& packed) {
  const auto integers = [](const Shape& s) {
    return std::vector{s.tokens, s.features, s.vocabulary, s.mixer_hidden, s.hidden,
                       s.heads,  s.layers,   s.H_cycles,   s.L_cycles,     s.rope_parts};
  };
  const auto numbers = [](const Shape& s) { return std::vector{s.lambda, s.norm_eps, s.H_std, s.L_std}; };
  if (integers(given) != integers(packed))
    fail("sizes must be those of the packed weights, ", list(integers(packed)), ", got ", list(integers(given)));
  if (numbers(given) != numbers(packed))
    fail("constants must be those of the packed weights, ", list(numbers(packed)), ", got ", list(numbers(given)));
  if (given.fixed_start != packed.fixed_start)
    fail("fixed_start must be that of the packed weights, ", packed.fixed_start, ", got ", given.fixed_start);
}

// Each arrangement holds every cell once.
inline void check_turns(const TurnCells& turns) {
  const int64_t rows = turns.cells.size(0) * turns.cells.size(1), S = turns.cells.size(2);
  const auto* cells = turns.cells.const_data_ptr<int64_t>();
  std::vector<int64_t> seen(size_t(S), -1);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t s = 0; s < S; ++s) {
      const int64_t cell = cells[r * S + s];
      if (cell < 0 || cell >= S || std::exchange(seen[size_t(cell)], r) == r)
        fail("turn_cells must hold each of 0..", S - 1, " once in every row, got ", cell, " in row ", r);
    }
}

// The engine for the run; throws std::invalid_argument naming what is wrong with its arguments.
inline Engine checked_engine(const RunArguments& run) {
  const Engine engine = engine_of(run.packed);
  check_operator(run.shape, *engine.shape);
  run.check();
  check_tensor("control", run.control, ScalarType::Long, {3});
  check_tokens("tokens", run.tokens.const_data_ptr<int64_t>(), run.puzzles(), run.shape.tokens, run.shape.vocabulary);
  if (run.turns) check_turns(*run.turns);
  return engine;
}

// It writes to `results`, and keeps pointers to `run.checkpoints` and to `at`, which it fills.
inline FixedPoint problem_of(const Engine& engine, const RunArguments& run, const RunResults& results,
                             std::vector<Records>* at) {
  const int64_t S = run.shape.tokens, T = run.trajectories();
  for (size_t c = 0; c < run.checkpoints.size(); ++c) at->push_back(results.at.records(int64_t(c), T, S));
  FixedPoint problem(run.rules);
  problem.window = std::min(run.rules.window, run.rules.depth);  // an older difference does not exist
  problem.engine = engine;
  problem.puzzles = run.puzzles();
  problem.tokens = run.tokens.const_data_ptr<int64_t>();
  problem.ids = run.ids.const_data_ptr<int64_t>();
  problem.checkpoints = run.checkpoints.data();
  problem.checkpoint_count = int64_t(run.checkpoints.size());
  problem.slots = run.slots;
  problem.end = results.end.records(0, T, S);
  problem.at = at->data();
  problem.residuals = run.trace ? results.residuals.mutable_data_ptr<float>() : nullptr;
  problem.winner = results.winner.mutable_data_ptr<int64_t>();
  problem.logits = results.logits.mutable_data_ptr<float>();
  problem.control = run.control.mutable_data_ptr<int64_t>();
  problem.state_size = S * run.shape.features;
  if (run.turns) {
    problem.turn_cells = run.turns->cells.const_data_ptr<int64_t>();
    problem.turn_every = run.turns->every;
    problem.turn_count = run.turns->cells.size(1);
  }
  if (run.keep_states) {
    problem.z_H = results.z_H.mutable_data_ptr<float>();
    problem.z_L = results.z_L.mutable_data_ptr<float>();
  }
  if (run.start) {
    problem.start_H = run.start->z_H.const_data_ptr<float>();
    problem.start_L = run.start->z_L.const_data_ptr<float>();
    problem.start_rng = run.start->rng.const_data_ptr<int64_t>();
  }
  return problem;
}

}  // namespace eqr::cpu
