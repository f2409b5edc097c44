#include "selection.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace eqr::cpu {
namespace {

// torch.nan_to_num(double(x), nan=nan): infinities become the largest finite numbers, on the near side of `nan`.
double finite_or(float x, double nan) {
  constexpr double kMost = std::numeric_limits<double>::max();
  return std::isnan(x) ? nan : std::clamp(double(x), -kMost, kMost);
}

uint64_t pack(int64_t restart, int64_t steps) { return uint64_t(steps) << 32 | uint64_t(restart); }

}  // namespace

SortKey sort_key(Select rule, const Ended& t) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  const double rank = t.status == kDiverged ? 2 : t.status == kCancelled ? 1 : 0;
  const double low_score = finite_or(t.score, kInf), unsettled = !settled(t.status);
  switch (rule) {
    case Select::vote: return {rank, low_score, 0, t.restart};
    case Select::q: return {rank, -finite_or(t.q_halt, -kInf), low_score, t.restart};
    case Select::first: return {rank, unsettled, settled(t.status) ? double(t.steps) : low_score, t.restart};
    default: return {rank, unsettled, low_score, t.restart};
  }
}

Selection::Selection(Select rule, int64_t puzzles, int64_t tokens, int64_t vocabulary, int64_t* winner, float* logits)
    : rule_(rule), tokens_(tokens), vocabulary_(vocabulary), winner_(winner), logits_(logits), puzzles_(puzzles) {}

void Selection::offer(const Ended& t) {
  const SortKey key = sort_key(rule_, t);
  const int64_t size = tokens_ * vocabulary_;
  Puzzle& puzzle = puzzles_[t.puzzle];
  const std::lock_guard lock(puzzle.mutex);
  if (rule_ == Select::vote) {
    Answer& answer = puzzle.answers[std::vector<int64_t>(t.preds, t.preds + tokens_)];
    answer.votes += t.status != kDiverged && t.status != kCancelled;
    if (answer.logits.empty() || key < answer.best) {
      answer.logits.assign(t.logits, t.logits + size);
      answer.best = key;
    }
  } else if (!puzzle.offered || key < puzzle.best) {
    puzzle.offered = true;
    puzzle.best = key;
    winner_[t.puzzle] = t.restart;
    std::copy_n(t.logits, size, logits_ + t.puzzle * size);
  }
}

void Selection::finish() {
  if (rule_ != Select::vote) return;
  const int64_t size = tokens_ * vocabulary_;
  const auto order = [](const auto& entry) {
    const Answer& answer = entry.second;
    return SortKey{answer.best.rank, -double(answer.votes), answer.best.first, answer.best.restart};
  };
  for (size_t n = 0; n < puzzles_.size(); ++n) {
    const auto& answers = puzzles_[n].answers;
    const auto best = std::min_element(answers.begin(), answers.end(),
                                       [&](const auto& a, const auto& b) { return order(a) < order(b); });
    if (best == answers.end()) continue;
    winner_[n] = best->second.best.restart;
    std::copy_n(best->second.logits.data(), size, logits_ + int64_t(n) * size);
  }
}

Race::Race(int64_t puzzles) : best_(puzzles) {
  for (std::atomic<uint64_t>& best : best_) best.store(std::numeric_limits<uint64_t>::max(), std::memory_order_relaxed);
}

void Race::settled(int64_t puzzle, int64_t restart, int64_t steps) {
  uint64_t best = best_[puzzle].load(std::memory_order_relaxed);
  while (pack(restart, steps) < best &&
         !best_[puzzle].compare_exchange_weak(best, pack(restart, steps), std::memory_order_relaxed)) {
  }
}

bool Race::cannot_win(int64_t puzzle, int64_t restart, int64_t steps) const {
  return pack(restart, steps + 1) > best_[puzzle].load(std::memory_order_relaxed);
}

}  // namespace eqr::cpu
