// Selection on cases made by hand; the same as in tests/solve/test_selection.py.
#include <algorithm>
#include <limits>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/loop/selection.h"

namespace {

using namespace eqr;
using namespace eqr::cpu;

constexpr Status C = kConverged, H = kHalted, M = kMaxDepth, X = kCancelled, D = kDiverged;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();

struct Case {
  const char* name;
  const char* answers;
  std::vector<Status> status;
  std::vector<float> score, q_halt;
  std::vector<int64_t> steps;
  const char* winners;  // by residual, vote, first, q; - for any
};

const std::vector<Case> kCases = {
    {"plain", "aabb", {C, C, C, C}, {3, 2, 1, 4}, {0, 0, 0, 0}, {5, 4, 3, 2}, "2232"},
    {"vote", "abbc", {C, C, C, C}, {1, 3, 2, 4}, {9, 1, 2, 3}, {5, 4, 3, 2}, "0230"},
    {"unsettled", "abcd", {M, C, M, C}, {1, 8, 2, 9}, {5, 5, 5, 5}, {16, 7, 16, 7}, "1010"},
    {"ties", "abcd", {M, M, M, M}, {4, 3, 3, 5}, {1, 2, 3, 3}, {16, 16, 16, 16}, "1112"},
    {"diverged", "abcd", {D, D, H, M}, {0, 0, 9, 1}, {9, 9, -1, 0}, {1, 1, 5, 16}, "2323"},
    {"votes of the diverged", "aaab", {D, D, D, M}, {0, 0, 0, 7}, {9, 9, 9, -9}, {1, 1, 1, 16}, "3333"},
    {"all diverged", "abcd", {D, D, D, D}, {kNaN, 2, 1, kNaN}, {kNaN, kNaN, kNaN, kNaN}, {1, 2, 3, 4}, "222-"},
    {"cancelled", "abcd", {X, X, M, D}, {0, 0, 9, 0}, {9, 9, -9, 9}, {0, 0, 16, 1}, "2222"},
    {"nan score", "abcd", {C, C, C, C}, {kNaN, 2, 1, 1}, {0, 0, 0, 0}, {3, 3, 2, 2}, "222-"},
    {"inf before nan", "abcd", {M, M, M, M}, {kNaN, kInf, kNaN, kInf}, {kNaN, -kInf, kNaN, 0}, {9, 9, 9, 9}, "1113"},
    {"diverged voter's better score", "aab", {D, M, M}, {0, 5, 4}, {0, 0, 0}, {1, 9, 9}, "2222"},
    {"diverged with a majority's answer", "aaab", {D, M, M, M}, {0, 5, 4, 1}, {0, 0, 1, 0}, {1, 9, 9, 9}, "3232"},
};

// Puzzles of two tokens and a vocabulary of one.
cpu::FixedPoint selected(Select rule, int64_t puzzles, int64_t* winner, float* logits) {
  cpu::FixedPoint run(RunRules{.select = rule});
  run.engine = {.tokens = 2, .vocabulary = 1};
  run.puzzles = puzzles, run.winner = winner, run.logits = logits;
  return run;
}

int64_t winner(const Case& c, Select rule, const std::vector<int>& order, float* logit) {
  int64_t winner[2] = {-1, -1};
  float logits[4] = {-1, -1, -1, -1};  // [2, S = 2, V = 1]
  const cpu::FixedPoint run = selected(rule, 2, winner, logits);
  Selection selection(run);
  for (int i : order) {
    const int64_t preds[2] = {c.answers[i], 1};
    const float own[2] = {float(i), float(i)};
    selection.offer({.puzzle = 1,
                     .restart = i,
                     .status = c.status[i],
                     .score = c.score[i],
                     .q_halt = c.q_halt[i],
                     .steps = c.steps[i],
                     .preds = preds,
                     .logits = own});
  }
  selection.finish();
  CHECK(winner[0] == -1 && logits[1] == -1, c.name);
  *logit = logits[3];
  return winner[1];
}

TEST(selection_rules_in_whatever_order_they_come) {
  constexpr Select kRules[] = {Select::residual, Select::vote, Select::first, Select::q};
  for (const Case& c : kCases)
    for (int r = 0; r < 4; ++r) {
      if (c.winners[r] == '-') continue;
      std::vector<int> order(c.status.size());
      std::iota(order.begin(), order.end(), 0);
      do {
        float logit;
        const int64_t got = winner(c, kRules[r], order, &logit);
        CHECK(got == c.winners[r] - '0' && logit == float(got), c.name, r, got);
      } while (std::next_permutation(order.begin(), order.end()));
    }
}

TEST(offers_from_many_threads) {
  constexpr int kThreads = 4, kEach = 200;
  for (Select rule : {Select::residual, Select::vote}) {
    int64_t winner = -1;
    float logits[2] = {};
    const cpu::FixedPoint run = selected(rule, 1, &winner, logits);
    Selection selection(run);
    const auto offer = [&](int first) {
      for (int i = first; i < kThreads * kEach; i += kThreads) {
        const int64_t preds[2] = {i % 3, i % 2};
        const float own[2] = {float(i), float(i)};
        selection.offer({.restart = i,
                         .status = C,
                         .score = float((i * 37 + 11) % 800),
                         .steps = 1,
                         .preds = preds,
                         .logits = own});
      }
    };
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) threads.emplace_back(offer, i);
    for (std::thread& thread : threads) thread.join();
    selection.finish();
    // 800 offers of six answers: those with i = 0 and 1 mod 6 come 134 times, the others 133 times.
    int best = -1;
    for (int i = 0; i < kThreads * kEach; ++i) {
      const bool common = rule == Select::residual || i % 6 < 2;
      if (common && (best < 0 || (i * 37 + 11) % 800 < (best * 37 + 11) % 800)) best = i;
    }
    CHECK(winner == best && logits[0] == float(best), winner, best);
  }
}

TEST(a_race_only_moves_forward) {
  Race race(2);
  CHECK(!race.cannot_win(0, 5, 0) && !race.cannot_win(0, 5, 1 << 20));
  race.settled(0, 3, 7);
  CHECK(!race.cannot_win(0, 9, 5) && race.cannot_win(0, 9, 6));  // step 7 ties, and the lower restart wins
  CHECK(!race.cannot_win(0, 2, 6) && race.cannot_win(0, 2, 7));
  race.settled(0, 4, 7);
  race.settled(0, 0, 8);
  CHECK(!race.cannot_win(0, 2, 6) && race.cannot_win(0, 4, 6));
  race.settled(0, 1, 7);
  CHECK(race.cannot_win(0, 2, 6) && !race.cannot_win(0, 0, 6));
  CHECK(!race.cannot_win(1, 5, 100));
  race.settled(1, (int64_t{1} << 32) - 1, (1 << 24) - 1);
  CHECK(race.cannot_win(1, 0, 1 << 24) && !race.cannot_win(1, 0, (1 << 24) - 2));
}

}  // namespace
