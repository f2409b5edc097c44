#include "problem.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <thread>
#include <tuple>

#include "check.h"

namespace eqr::test {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kMost = std::numeric_limits<double>::max();

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

}  // namespace

bool close(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) || a == b || std::fabs(a - b) <= 1e-6f * std::fabs(b);
}

Table::Table(int64_t t, int64_t tokens)
    : preds(t * tokens, -7), q_halt(t, -7), residual(t, -7), score(t, -7), steps(t, -7), status(t, -7) {}

Records Table::records() {
  return {preds.data(), q_halt.data(), residual.data(), score.data(), steps.data(), status.data()};
}

Problem::Problem(int64_t puzzles) {
  for (int64_t n = 0; n < puzzles; ++n) ids.push_back((n + 1) * 1000003 - (int64_t{1} << 40));
}

std::vector<int64_t> Problem::tokens() const {
  std::vector<int64_t> tokens;
  for (int64_t id : ids)
    for (int64_t s = 0; s < mock.tokens; ++s) tokens.push_back((id + s) & 1);
  return tokens;
}

Result::Result(const Problem& p)
    : end(p.trajectories(), p.mock.tokens),
      at(p.checkpoints.size(), end),
      residuals(p.trajectories() * p.depth, kNaN),
      winner(p.puzzles(), -7),
      logits(p.puzzles() * p.mock.tokens * p.mock.vocabulary, -7),
      control(3),
      tokens_(p.tokens()) {}

cpu::FixedPoint Result::fixed_point(const Problem& p) {
  at_records_.clear();
  for (Table& table : at) at_records_.push_back(table.records());
  cpu::FixedPoint run(RunRules{.seed = p.seed,
                               .breadth = p.breadth,
                               .depth = p.depth,
                               .halt = p.halt,
                               .tol = p.tol,
                               .patience = p.patience,
                               .select = p.select,
                               .window = p.window,
                               .noise_scale = p.noise_scale});
  run.engine = p.mock.engine();
  run.puzzles = p.puzzles(), run.tokens = tokens_.data(), run.ids = p.ids.data();
  run.checkpoints = p.checkpoints.data(), run.checkpoint_count = int64_t(p.checkpoints.size());
  run.slots = p.slots;
  run.end = end.records(), run.at = at_records_.data(), run.residuals = residuals.data();
  run.winner = winner.data(), run.logits = logits.data(), run.control = control.data();
  return run;
}

void run_on(const cpu::FixedPoint& problem, int threads, bool (*poll)()) {
  cpu::FixedPointRun run(problem, threads);
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; ++i) pool.emplace_back([&run] { run.work(nullptr); });
  run.work(poll);
  for (std::thread& thread : pool) thread.join();
  run.finish();
}

void solve_into(Result& result, const Problem& p, int threads, bool (*poll)()) {
  run_on(result.fixed_point(p), threads, poll);
}

Result solve(const Problem& p, int threads) {
  Result result(p);
  solve_into(result, p, threads, nullptr);
  return result;
}

bool same(const Table& a, const Table& b) {
  return same_bytes(a.preds, b.preds) && same_bytes(a.q_halt, b.q_halt) && same_bytes(a.residual, b.residual) &&
         same_bytes(a.score, b.score) && same_bytes(a.steps, b.steps) && same_bytes(a.status, b.status);
}

bool same(const Result& a, const Result& b) {
  bool all = same(a.end, b.end) && a.at.size() == b.at.size() && same_bytes(a.residuals, b.residuals) &&
             same_bytes(a.winner, b.winner) && same_bytes(a.logits, b.logits);
  for (size_t c = 0; all && c < a.at.size(); ++c) all = same(a.at[c], b.at[c]);
  return all;
}

Oracle::Oracle(const Problem& p) : p_(p), history_(p.trajectories()) {
  Mock mock;
  mock.tokens = p.mock.tokens, mock.vocabulary = p.mock.vocabulary, mock.answers = p.mock.answers;
  mock.zero = p.mock.zero, mock.fault = p.mock.fault;
  const cpu::Engine engine = mock.engine();
  const std::vector<int64_t> tokens = p.tokens();
  void* workspace = std::aligned_alloc(64, size_t(engine.workspace_bytes + 63) / 64 * 64);
  std::memset(workspace, 0, size_t(engine.workspace_bytes));
  const cpu::Member alone{nullptr, 0, 1};
  for (int64_t t = 0; t < p.trajectories(); ++t) {
    const int64_t n = t / p.breadth;
    cpu::StepInput in{tokens.data() + n * engine.tokens, {p.seed, t % p.breadth, p.ids[n], 0}, p.noise_scale};
    engine.start(engine.packed, workspace, in, alone);
    for (; in.rng[3] < p.depth; ++in.rng[3]) {
      engine.outer_step(engine.packed, workspace, in, alone);
      const auto& out = *static_cast<const cpu::StepOutput*>(workspace);
      Step step{{out.logits, out.logits + engine.tokens * engine.vocabulary}, 0, out.q_halt, true};
      if (out.change_sq != 0 || out.size_sq != 0) step.residual = std::sqrt(out.change_sq / out.size_sq);
      step.finite = std::isfinite(step.residual) && std::isfinite(step.q_halt);
      for (float x : step.logits) step.finite = step.finite && std::isfinite(x);
      history_[t].push_back(step);
    }
  }
  std::free(workspace);
}

int64_t Oracle::last_step(const std::vector<Step>& history, int64_t depth, Status* status) const {
  for (int64_t k = 1; k <= depth; ++k) {
    bool patient = k >= p_.patience;
    for (int64_t j = k - p_.patience; patient && j < k; ++j) patient = history[j].residual <= p_.tol;
    const bool wants = history[k - 1].q_halt > 0;
    bool converged = false, halted = false;
    switch (p_.halt) {
      case Halt::none: break;
      case Halt::residual: converged = patient; break;
      case Halt::q: halted = wants; break;
      case Halt::residual_and_q: converged = patient && wants; break;
      case Halt::residual_or_q: converged = patient, halted = wants && !patient; break;
    }
    *status = !history[k - 1].finite ? kDiverged
              : converged            ? kConverged
              : halted               ? kHalted
              : k == p_.depth        ? kMaxDepth
                                     : kGoing;
    if (*status != kGoing) return k;
  }
  return depth;
}

void Oracle::record(int64_t t, int64_t depth, Table* to) const {
  const std::vector<Step>& history = history_[t];
  const int64_t S = p_.mock.tokens, V = p_.mock.vocabulary;
  Status status = kGoing;
  const int64_t k = last_step(history, depth, &status);
  std::vector<double> changes;
  for (int64_t j = 1; j < k; ++j) {
    double change = 0;
    for (int64_t s = 0; s < S; ++s) {
      double sum = 0;
      for (int64_t i = s * V; i < (s + 1) * V; ++i)
        sum += std::pow(double(history[j].logits[i]) - history[j - 1].logits[i], 2);
      change += std::sqrt(sum) / double(S);
    }
    changes.push_back(change);
  }
  if (k == 1) changes = {history[0].residual};
  double sum = 0;
  int64_t count = 0;
  for (int64_t j = std::max(int64_t(0), int64_t(changes.size()) - p_.window); j < int64_t(changes.size()); ++j)
    if (!std::isnan(changes[j])) sum += changes[j], ++count;
  const std::vector<float> kept = logits(t, k);
  for (int64_t s = 0; s < S; ++s) {
    int64_t best = 0;
    for (int64_t v = 1; v < V; ++v)
      if (kept[s * V + v] > kept[s * V + best]) best = v;
    to->preds[t * S + s] = best;
  }
  to->q_halt[t] = history[k - 1].q_halt;
  to->residual[t] = history[k - 1].residual;
  to->score[t] = count ? float(sum / double(count)) : kNaN;
  to->steps[t] = k;
  to->status[t] = status;
}

std::vector<float> Oracle::logits(int64_t t, int64_t steps) const {
  if (steps > 0 && !history_[t][steps - 1].finite) --steps;
  return steps > 0 ? history_[t][steps - 1].logits : std::vector<float>(p_.mock.tokens * p_.mock.vocabulary);
}

Table Oracle::table(int64_t depth) const {
  Table table(p_.trajectories(), p_.mock.tokens);
  for (int64_t t = 0; t < p_.trajectories(); ++t) record(t, depth, &table);
  return table;
}

std::vector<int64_t> Oracle::winners(const Table& table) const {
  const auto finite = [](double x, double nan) { return std::isnan(x) ? nan : std::min(std::max(x, -kMost), kMost); };
  const int64_t S = p_.mock.tokens;
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const auto answer = [&](int64_t t) { return std::vector(&table.preds[t * S], &table.preds[t * S] + S); };
  std::vector<int64_t> winners;
  for (int64_t n = 0; n < p_.puzzles(); ++n) {
    std::tuple<int, double, double, int64_t> best{};
    for (int64_t b = 0; b < p_.breadth; ++b) {
      const int64_t t = n * p_.breadth + b, status = table.status[t];
      const int rank = status == kDiverged ? 2 : status == kCancelled ? 1 : 0;
      const bool settled = status == kConverged || status == kHalted;
      const double score = finite(table.score[t], kInfinity);
      double votes = 0;
      for (int64_t u = n * p_.breadth; u < (n + 1) * p_.breadth; ++u)
        votes += table.status[u] != kDiverged && table.status[u] != kCancelled && answer(u) == answer(t);
      std::tuple<int, double, double, int64_t> key{rank, !settled, score, b};
      if (p_.select == Select::vote) key = {rank, -votes, score, b};
      if (p_.select == Select::q) key = {rank, -finite(table.q_halt[t], -kInfinity), score, b};
      if (p_.select == Select::first && settled) key = {rank, 0, double(table.steps[t]), b};
      if (b == 0 || key < best) best = key;
    }
    winners.push_back(std::get<3>(best));
  }
  return winners;
}

static void check_table(const Table& got, const Table& want, const char* what, int64_t depth) {
  CHECK(same_bytes(got.preds, want.preds), what, depth);
  for (size_t t = 0; t < want.steps.size(); ++t) {
    CHECK(got.steps[t] == want.steps[t], what, depth, t, got.steps[t], want.steps[t]);
    CHECK(got.status[t] == want.status[t], what, depth, t, got.status[t], want.status[t]);
    CHECK(close(got.residual[t], want.residual[t]), what, depth, t, got.residual[t], want.residual[t]);
    CHECK(close(got.score[t], want.score[t]), what, depth, t, got.score[t], want.score[t]);
    CHECK(close(got.q_halt[t], want.q_halt[t]), what, depth, t, got.q_halt[t], want.q_halt[t]);
  }
}

void check_against_oracle(const Problem& p, const Oracle& oracle, const Result& result, const char* what) {
  const Table end = oracle.table(p.depth);
  check_table(result.end, end, what, p.depth);
  for (size_t c = 0; c < p.checkpoints.size(); ++c)
    check_table(result.at[c], oracle.table(p.checkpoints[c]), what, p.checkpoints[c]);
  const std::vector<int64_t> winners = oracle.winners(result.end);
  CHECK(result.winner == winners, what);
  int64_t spent = 0;
  for (int64_t t = 0; t < p.trajectories(); ++t) {
    spent += end.steps[t];
    for (int64_t k = 0; k < p.depth; ++k) {
      const float want = k < end.steps[t] ? oracle.residual(t, k) : kNaN;
      CHECK(close(result.residuals[t * p.depth + k], want), what, t, k);
    }
  }
  const int64_t size = p.mock.tokens * p.mock.vocabulary;
  for (int64_t n = 0; n < p.puzzles(); ++n) {
    const int64_t t = n * p.breadth + winners[n];
    const std::vector<float> logits(result.logits.begin() + n * size, result.logits.begin() + (n + 1) * size);
    CHECK(same_bytes(logits, oracle.logits(t, end.steps[t])), what, n);
  }
  CHECK(result.control[1] == p.trajectories(), what, result.control[1]);
  CHECK(result.control[2] == spent, what, result.control[2], spent);
  CHECK(p.mock.mistakes == 0, what, p.mock.mistakes);
}

}  // namespace eqr::test
