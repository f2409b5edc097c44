// Halting, recording and selection of the fixed-point loop, against the oracle.
#include <algorithm>
#include <cmath>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/loop/selection.h"
#include "problem.h"

namespace {

using namespace eqr::test;
using eqr::cpu::FixedPointRun;

int64_t count(const Table& table, int64_t status) {
  return std::count(table.status.begin(), table.status.end(), status);
}

std::vector<int64_t> every_depth(int64_t depth) {
  std::vector<int64_t> all;
  for (int64_t k = 1; k <= depth; ++k) all.push_back(k);
  return all;
}

TEST(each_trajectory_stops_when_it_has_settled) {
  for (int64_t patience : {1, 3}) {
    Problem p(6);
    p.patience = patience;
    p.depth = 9;
    p.checkpoints = {1, 2, 6, 9};
    const Result result = solve(p, 2);
    check_against_oracle(p, Oracle(p), result, "residual");
    const std::set<int64_t> steps(result.end.steps.begin(), result.end.steps.end());
    const int64_t converged = count(result.end, eqr::kConverged);
    CHECK(steps.size() > 3 && converged > 3 && converged < p.trajectories(), patience, steps.size(), converged);
  }
}

TEST(patience_counts_steps_in_a_row) {
  Problem p(8);
  p.depth = 60;
  p.noise_scale = 0.03f;  // residuals that go up and down about the tolerance
  p.tol = 0.03f;
  p.patience = 3;
  const Oracle oracle(p);
  const Result result = solve(p, 2);
  check_against_oracle(p, oracle, result, "patience");
  int interrupted = 0;
  for (int64_t t = 0; t < p.trajectories(); ++t)
    for (int64_t k = 1; k < result.end.steps[t] - 3; ++k)
      interrupted += oracle.residual(t, k - 1) <= p.tol && oracle.residual(t, k) > p.tol;
  CHECK(interrupted > 5, interrupted);
}

TEST(q_halting) {
  Problem p(8);
  p.depth = 12;
  p.halt = Halt::q;
  p.select = Select::q;
  p.checkpoints = every_depth(12);
  const Result result = solve(p, 2);
  check_against_oracle(p, Oracle(p), result, "q");
  CHECK(count(result.end, eqr::kHalted) > 3 && count(result.end, eqr::kMaxDepth) > 3);
}

TEST(a_fixed_depth_and_its_checkpoints) {
  Problem p(3);
  p.halt = Halt::none;
  p.depth = 9;
  p.checkpoints = {1, 2, 5, 9};
  p.select = Select::vote;
  const Result deep = solve(p, 2);
  check_against_oracle(p, Oracle(p), deep, "none");
  CHECK(count(deep.end, eqr::kMaxDepth) == p.trajectories());
  CHECK(count(deep.at[2], eqr::kGoing) == p.trajectories());
  for (size_t c = 0; c < 4; ++c) {
    Problem shallow(3);
    shallow.halt = Halt::none;
    shallow.depth = p.checkpoints[c];
    Table at = deep.at[c];
    std::fill(at.status.begin(), at.status.end(), eqr::kMaxDepth);
    CHECK(same(solve(shallow, 1).end, at), p.checkpoints[c]);
  }
}

TEST(the_score_is_a_mean_over_the_window) {
  for (int64_t window : {int64_t{1}, int64_t{3}, int64_t{50}, int64_t{100000000000}}) {
    Problem p(2);
    p.window = window;
    p.depth = 8;
    p.checkpoints = every_depth(8);
    p.halt = Halt::none;
    const Result result = solve(p, 1);
    check_against_oracle(p, Oracle(p), result, "window");
    CHECK(result.at[0].score == result.at[0].residual);
  }
}

Fault faults(int64_t id, int64_t restart, int64_t step) {
  const int64_t puzzle = (id + (int64_t{1} << 40)) / 1000003 - 1;
  if (puzzle == 0 && step == 0) return restart == 0 ? Fault::nan_logits : Fault::nan_residual;
  if (puzzle == 1 && restart == 1 && step == 2) return Fault::infinite_logits;
  if (puzzle == 2 && restart == 2 && step == 1) return Fault::nan_q;
  if (puzzle == 3 && restart == 0 && step == 3) return Fault::nan_residual;
  return Fault::none;
}

TEST(what_diverges_stops_and_leaves_its_neighbours_alone) {
  for (Select select : {Select::residual, Select::vote, Select::q}) {
    Problem p(5);
    p.depth = 12;
    p.select = select;
    p.mock.answers = 2;
    p.checkpoints = {1, 3, 12};
    const Result clean = solve(p, 2);
    p.mock.fault = faults;
    const Result result = solve(p, 2);
    check_against_oracle(p, Oracle(p), result, "diverged");
    CHECK(count(result.end, eqr::kDiverged) == 6, count(result.end, eqr::kDiverged));
    for (int64_t t = 0; t < p.trajectories(); ++t) {
      if (result.end.status[t] == eqr::kDiverged) continue;
      CHECK(result.end.steps[t] == clean.end.steps[t] && result.end.score[t] == clean.end.score[t], t);
    }
    for (float x : result.logits) CHECK(std::isfinite(x));
    for (int64_t s = 0; s < p.mock.tokens; ++s) CHECK(result.end.preds[s] == 0, s);  // no finite logits ever
  }
}

TEST(a_state_that_is_zero_has_settled) {
  Problem p(2);
  p.mock.zero = true;
  p.noise_scale = 0;
  const Result result = solve(p, 2);
  check_against_oracle(p, Oracle(p), result, "zero");
  for (int64_t t = 0; t < p.trajectories(); ++t)
    CHECK(result.end.residual[t] == 0 && result.end.steps[t] == 1 && result.end.status[t] == eqr::kConverged);
  // All logits are equal: the first is the answer.
  for (int64_t pred : result.end.preds) CHECK(pred == 0);
}

TEST(any_threads_slots_and_order_give_the_same_bits) {
  Problem p(7);
  p.depth = 25;
  p.checkpoints = {1, 4, 25};
  const Result alone = solve(p, 1);
  check_against_oracle(p, Oracle(p), alone, "alone");
  p.mock.sleep_us = 200;
  for (int threads : {1, 2, 3, 4})
    for (int64_t slots : {1, 2, 3, 100}) {
      p.slots = slots;
      CHECK(same(solve(p, threads), alone), threads, slots);
    }
  CHECK(p.mock.mistakes == 0 && p.mock.shared_steps > 0, p.mock.mistakes);
  std::reverse(p.ids.begin(), p.ids.end());
  const Result reversed = solve(p, 2);
  for (int64_t n = 0; n < 7; ++n) {
    CHECK(reversed.winner[n] == alone.winner[6 - n], n);
    for (int64_t b = 0; b < p.breadth; ++b) {
      const int64_t t = n * p.breadth + b, u = (6 - n) * p.breadth + b;
      CHECK(reversed.end.steps[t] == alone.end.steps[u] && reversed.end.score[t] == alone.end.score[u], t);
    }
  }
}

TEST(a_run_goes_on_from_the_states_of_another) {
  constexpr int64_t kFirst = 7, kThen = 12, N = 5;
  Problem p(N);
  p.halt = Halt::none, p.breadth = 1, p.depth = kFirst + kThen;
  const Result whole = solve(p, 1);
  p.depth = kFirst;
  std::vector<float> z_H(N * kMockState), z_L(N * kMockState);
  Result first(p);
  eqr::cpu::FixedPoint run = first.fixed_point(p);
  run.z_H = z_H.data(), run.z_L = z_L.data(), run.state_size = kMockState;
  run_on(run, 2);
  // Three trajectories of each puzzle, all from its state: each is what the first one was.
  p.depth = kThen, p.breadth = 3;
  std::vector<float> start_H, start_L;
  std::vector<int64_t> rng;
  for (int64_t t = 0; t < p.trajectories(); ++t) {
    const auto n = t / p.breadth * kMockState;
    start_H.insert(start_H.end(), &z_H[n], &z_H[n] + kMockState);
    start_L.insert(start_L.end(), &z_L[n], &z_L[n] + kMockState);
    rng.insert(rng.end(), {p.seed, 0, p.ids[t / p.breadth], kFirst});
  }
  for (int threads : {1, 4}) {
    Result then(p);
    run = then.fixed_point(p);
    run.start_H = start_H.data(), run.start_L = start_L.data(), run.start_rng = rng.data();
    run.state_size = kMockState;
    run_on(run, threads);
    for (int64_t t = 0; t < p.trajectories(); ++t) {
      const int64_t n = t / p.breadth, S = p.mock.tokens;
      CHECK(then.end.residual[t] == whole.end.residual[n] && then.end.q_halt[t] == whole.end.q_halt[n], threads, t);
      CHECK(std::equal(&whole.end.preds[n * S], &whole.end.preds[n * S] + S, &then.end.preds[t * S]), threads, t);
      CHECK(then.end.steps[t] == kThen, threads, t);
    }
  }
}

// A run whose cells turn: arrangements [N, V, S], drawn at random, or such as move nothing.
struct Turned {
  Problem p{5};
  std::vector<int64_t> cells;
  static constexpr int64_t kCount = 3;

  explicit Turned(bool moved) {
    p.mock.tokens = 8;  // of which each has six numbers of a state
    p.depth = 17;
    std::minstd_rand random(5);
    for (int64_t row = 0; row < p.puzzles() * kCount; ++row) {
      std::vector<int64_t> order(size_t(p.mock.tokens));
      std::iota(order.begin(), order.end(), 0);
      if (moved) std::shuffle(order.begin(), order.end(), random);
      cells.insert(cells.end(), order.begin(), order.end());
    }
  }

  Result solve(int threads, int64_t every) {
    Result result(p);
    eqr::cpu::FixedPoint run = result.fixed_point(p);
    run.turn_cells = cells.data(), run.turn_every = every, run.turn_count = kCount, run.state_size = kMockState;
    run_on(run, threads);
    return result;
  }
};

TEST(turns_that_move_nothing_change_streaks_and_scores_alone) {
  Turned turned(false);
  turned.p.checkpoints = {2, 3, 4, 11};
  const Result still = solve(turned.p, 1);
  for (int64_t every : {1, 3, 4, 40}) {
    const Result result = turned.solve(1, every);
    const auto alike = [&](const Table& a, const Table& b) {
      return a.preds == b.preds && a.steps == b.steps && a.status == b.status && a.residual == b.residual;
    };
    CHECK(alike(result.end, still.end), every);
    for (size_t c = 0; c < 4; ++c) CHECK(alike(result.at[c], still.at[c]), every, c);
    CHECK(every < 40 || same(result, still), every);
  }
  turned.p.patience = 3;
  CHECK(count(solve(turned.p, 1).end, eqr::kConverged) > 0);
  const Result broken_off = turned.solve(1, 2);
  CHECK(count(broken_off.end, eqr::kConverged) == 0);  // no streak outlives a turn
}

TEST(turned_trajectories_do_not_depend_on_threads_nor_on_one_that_diverges) {
  Turned turned(true);
  turned.p.checkpoints = every_depth(17);
  // Of the second puzzle's second trajectory, the first step after a turn.
  turned.p.mock.fault = [](int64_t id, int64_t restart, int64_t step) {
    return id == Problem(5).ids[1] && restart == 1 && step == 3 ? Fault::nan_logits : Fault::none;
  };
  const Result alone = turned.solve(1, 3);
  CHECK(!same(alone, solve(turned.p, 1)));
  for (int threads : {2, 5}) CHECK(same(turned.solve(threads, 3), alone), threads);
  const int64_t lost = turned.p.breadth + 1;
  CHECK(alone.end.status[lost] == eqr::kDiverged && alone.end.steps[lost] == 4);
  CHECK(count(alone.end, eqr::kDiverged) == 1);
  for (int64_t s = 0; s < 8; ++s) CHECK(alone.end.preds[lost * 8 + s] == alone.at[2].preds[lost * 8 + s], s);
}

TEST(the_state_kept_is_that_of_the_winner) {
  for (Select select : {Select::residual, Select::vote}) {
    Problem p(4);
    p.select = select, p.depth = 9, p.mock.answers = 2;
    const int64_t N = p.puzzles();
    std::vector<float> z_H(N * kMockState), z_L(N * kMockState);
    Result result(p);
    eqr::cpu::FixedPoint run = result.fixed_point(p);
    run.z_H = z_H.data(), run.z_L = z_L.data(), run.state_size = kMockState;
    run_on(run, 3);
    CHECK(same(result, solve(p, 1)));
    const std::set<int64_t> winners(result.winner.begin(), result.winner.end());
    CHECK(winners.size() > 1, winners.size());
    // The mock's logits are sums of two of the state's numbers, three times the first.
    for (int64_t n = 0; n < N; ++n)
      CHECK(result.logits[n * p.mock.tokens * p.mock.vocabulary] == 3 * z_H[n * kMockState] + z_H[n * kMockState], n);
  }
}

TEST(each_end_is_told_once_with_what_is_recorded) {
  Problem p(6);
  p.mock.sleep_us = 100;
  struct Seen {
    std::mutex mutex;
    std::vector<eqr::cpu::Ended> ended;
    std::vector<std::vector<int64_t>> preds;
  } seen;
  Result result(p);
  eqr::cpu::FixedPoint run = result.fixed_point(p);
  run.on_end_context = &seen;
  run.on_end = [](void* context, const eqr::cpu::Ended& t) {
    Seen& s = *static_cast<Seen*>(context);
    const std::lock_guard lock(s.mutex);
    s.ended.push_back(t);
    s.preds.emplace_back(t.preds, t.preds + t.tokens);
  };
  run_on(run, 4);
  std::set<int64_t> numbers;
  for (size_t i = 0; i < seen.ended.size(); ++i) {
    const eqr::cpu::Ended& e = seen.ended[i];
    const int64_t t = e.puzzle * p.breadth + e.restart, S = p.mock.tokens;
    numbers.insert(t);
    CHECK(e.status == result.end.status[t] && e.steps == result.end.steps[t] && e.score == result.end.score[t], t);
    CHECK(e.residual == result.end.residual[t] && e.q_halt == result.end.q_halt[t], t);
    CHECK(std::equal(seen.preds[i].begin(), seen.preds[i].end(), &result.end.preds[t * S]), t);
  }
  CHECK(seen.ended.size() == size_t(p.trajectories()) && numbers.size() == seen.ended.size(), seen.ended.size());
}

TEST(both_signals_or_either) {
  for (Halt halt : {Halt::residual_and_q, Halt::residual_or_q})
    for (int64_t patience : {1, 3}) {
      Problem p(8);
      p.halt = halt;
      p.patience = patience;
      p.depth = 20;
      p.tol = 0.05f;
      p.checkpoints = every_depth(20);
      const Oracle oracle(p);
      const Result result = solve(p, 2);
      check_against_oracle(p, oracle, result, "signals");
      const bool both = halt == Halt::residual_and_q;
      CHECK(count(result.end, eqr::kConverged) > 3, both, patience, count(result.end, eqr::kConverged));
      CHECK(count(result.end, eqr::kHalted) > 3 != both, both, patience, count(result.end, eqr::kHalted));
      // The signals disagree: what one of them alone would end at another step.
      for (Halt alone : {Halt::residual, Halt::q}) {
        p.halt = alone;
        const Table end = Oracle(p).table(p.depth);
        int64_t differ = 0;
        for (int64_t t = 0; t < p.trajectories(); ++t) differ += end.steps[t] != result.end.steps[t];
        CHECK(differ > 1, both, patience, int(alone), differ);
      }
    }
}

// Drawn problems, with everything that can be asked for at once.
TEST(drawn_problems) {
  uint64_t state = 12345;
  const auto draw = [&state](int64_t n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return int64_t(state >> 33) % n;
  };
  constexpr Halt kHalts[] = {Halt::none, Halt::residual, Halt::q, Halt::residual_and_q, Halt::residual_or_q};
  constexpr Select kSelects[] = {Select::residual, Select::vote, Select::q};
  for (int i = 0; i < 100; ++i) {
    Problem p(1 + draw(5));
    p.breadth = 1 + draw(5);
    p.depth = 1 + draw(12);
    p.halt = kHalts[draw(5)];
    p.select = kSelects[draw(3)];
    p.patience = 1 + draw(3);
    p.window = 1 + draw(5);
    p.tol = 0.01f * float(1 + draw(10));
    p.slots = 1 + draw(5);
    p.seed = draw(1000);
    p.mock.answers = 1 + int(draw(3));
    p.mock.sleep_us = draw(2) ? 100 : 0;
    p.mock.tokens = 1 + draw(kMockTokens);
    p.mock.vocabulary = 2 + draw(kMockVocabulary - 1);
    if (draw(2)) p.mock.fault = faults;
    for (int64_t k = 1; k <= p.depth; ++k)
      if (draw(3) == 0) p.checkpoints.push_back(k);
    const int threads = 1 + int(draw(4));
    check_against_oracle(p, Oracle(p), solve(p, threads), text("problem ", i).c_str());
  }
}

}  // namespace
