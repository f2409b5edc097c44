#include "cpu/loop/selection.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace eqr::cpu {

Selection::Selection(Select rule, int64_t puzzles, int64_t tokens, int64_t vocabulary, int64_t* winner, float* logits)
    : rule_(rule), tokens_(tokens), vocabulary_(vocabulary), winner_(winner), logits_(logits), puzzles_(puzzles) {}

void Selection::offer(const Ended& t) {
  const WinnerKey key = winner_key(rule_, t.status, t.score, t.q_halt, t.steps, 0, t.restart);
  const int64_t size = tokens_ * vocabulary_;
  Puzzle& puzzle = puzzles_[t.puzzle];
  const std::lock_guard lock(puzzle.mutex);
  if (rule_ == Select::vote) {
    Answer& answer = puzzle.answers[std::vector<int64_t>(t.preds, t.preds + tokens_)];
    answer.votes += votes(t.status);
    if (answer.logits.empty() || before(key, answer.best)) {
      answer.logits.assign(t.logits, t.logits + size);
      answer.best = key;
    }
  } else if (!puzzle.offered || before(key, puzzle.best)) {
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
    return WinnerKey{answer.best.rank, -double(answer.votes), answer.best.second, answer.best.restart};
  };
  for (size_t n = 0; n < puzzles_.size(); ++n) {
    const auto& answers = puzzles_[n].answers;
    const auto best = std::min_element(answers.begin(), answers.end(),
                                       [&](const auto& a, const auto& b) { return before(order(a), order(b)); });
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
  while (place_in_race(steps, restart) < best &&
         !best_[puzzle].compare_exchange_weak(best, place_in_race(steps, restart), std::memory_order_relaxed)) {
  }
}

bool Race::cannot_win(int64_t puzzle, int64_t restart, int64_t steps) const {
  return place_in_race(steps + 1, restart) > best_[puzzle].load(std::memory_order_relaxed);
}

}  // namespace eqr::cpu
