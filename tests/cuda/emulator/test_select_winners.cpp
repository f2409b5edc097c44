// The selection of winners on the device against that on the host, over runs drawn at random with many ties.
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/loop/selection.h"
#include "cuda/select_winners.h"
#include "emulator.h"

namespace {

using namespace eqr;
using emu::Emulated;

constexpr int64_t kTokens = 3, kVocabulary = 2, kLogits = kTokens * kVocabulary;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();

struct Run {
  int64_t puzzles, breadth;
  std::vector<int64_t> preds, steps, status;
  std::vector<float> q_halt, residual, score, logits;

  Run(int64_t puzzles, int64_t breadth, bool sound, uint32_t seed) : puzzles(puzzles), breadth(breadth) {
    std::mt19937 random(seed);
    const auto one_of = [&](const auto& values) { return values[random() % values.size()]; };
    const std::vector<int64_t> good = {kConverged, kHalted, kMaxDepth};
    const std::vector<int64_t> any = {kConverged, kHalted, kMaxDepth, kCancelled, kDiverged};
    const std::vector<float> finite = {-1, 0.25f, 0.5f, 3}, none = {kNaN, kInf};
    const std::vector<float> odd = seed % 2 ? none : std::vector<float>{0.25f, 3, kNaN, kInf, -kInf, 3.4e38f};
    for (int64_t t = 0; t < puzzles * breadth; ++t) {
      for (int64_t i = 0; i < kTokens; ++i) preds.push_back(int64_t(random() % (1 + seed % 3)));
      for (int64_t i = 0; i < kLogits; ++i) logits.push_back(float(t * kLogits + i));
      steps.push_back(1 + int64_t(random() % 3));
      status.push_back(one_of(sound ? good : any));
      score.push_back(one_of(sound ? finite : odd));
      q_halt.push_back(one_of(sound ? finite : odd));
      residual.push_back(0);
    }
  }
};

struct Winners {
  std::vector<int64_t> restart;
  std::vector<float> logits;
  bool operator==(const Winners&) const = default;
};

Winners on_the_host(const Run& run, Select rule) {
  Winners out{std::vector<int64_t>(run.puzzles, -1), std::vector<float>(run.puzzles * kLogits)};
  cpu::FixedPoint rules(RunRules{.select = rule});
  rules.engine = {.tokens = kTokens, .vocabulary = kVocabulary};
  rules.puzzles = run.puzzles, rules.winner = out.restart.data(), rules.logits = out.logits.data();
  cpu::Selection selection(rules);
  for (int64_t t = 0; t < run.puzzles * run.breadth; ++t)
    selection.offer({.puzzle = t / run.breadth,
                     .restart = t % run.breadth,
                     .status = Status(run.status[t]),
                     .score = run.score[t],
                     .q_halt = run.q_halt[t],
                     .steps = run.steps[t],
                     .preds = &run.preds[t * kTokens],
                     .logits = &run.logits[t * kLogits]});
  selection.finish();
  return out;
}

Winners emulated(Run run, Select rule, int ctas, int seed) {
  using Body = cuda::SelectWinners<Emulated>;
  Winners out{std::vector<int64_t>(run.puzzles, -1), std::vector<float>(run.puzzles * kLogits)};
  std::vector<uint64_t> votes(run.puzzles * run.breadth, ~uint64_t{0});
  cuda::Problem p{};
  p.shape.tokens = kTokens;
  p.shape.vocabulary = kVocabulary;
  p.puzzles = run.puzzles;
  p.breadth = run.breadth, p.select = rule;
  p.end = {.preds = run.preds.data(),
           .q_halt = run.q_halt.data(),
           .residual = run.residual.data(),
           .score = run.score.data(),
           .steps = run.steps.data(),
           .status = run.status.data()};
  p.logits = run.logits.data();
  emu::launch({.ctas = ctas, .threads = Body::kThreads, .shared_bytes = sizeof(Body::Shared), .seed = uint64_t(seed)},
              [&] { Body{p, out.restart.data(), out.logits.data(), votes.data()}.run(); });
  return out;
}

TEST(winners_are_those_of_the_host) {
  constexpr Select kRules[] = {Select::residual, Select::vote, Select::q, Select::first};
  constexpr int64_t kBreadths[] = {1, 2, 3, 7, 64, 128, 129, 300};
  int seed = 0;
  for (Select rule : kRules)
    for (int64_t breadth : kBreadths)
      for (int repeat = 0; repeat < 7; ++repeat, ++seed) {
        const Run run(repeat == 6 ? 0 : 4, breadth, repeat % 3 == 1, uint32_t(seed));
        CHECK(emulated(run, rule, 1 + repeat % 3, seed) == on_the_host(run, rule), int(rule), breadth, repeat);
      }
}

TEST(winners_of_ten_schedules) {
  const Run run(3, 130, false, 5);
  for (int seed = 0; seed < 10; ++seed)
    for (Select rule : {Select::vote, Select::residual})
      CHECK(emulated(run, rule, 2, seed) == on_the_host(run, rule), seed, int(rule));
}

}  // namespace
