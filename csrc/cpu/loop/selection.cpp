#include "cpu/loop/selection.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace eqr::cpu {

Selection::Selection(const FixedPoint& p) : p_(p), puzzles_(p.puzzles) {}

void Selection::choose(int64_t puzzle, int64_t restart, const float* logits, const float* z_H, const float* z_L) {
  const int64_t size = p_.engine.tokens * p_.engine.vocabulary;
  p_.winner[puzzle] = restart;
  std::copy_n(logits, size, p_.logits + puzzle * size);
  if (!p_.z_H) return;
  std::copy_n(z_H, p_.state_size, p_.z_H + puzzle * p_.state_size);
  std::copy_n(z_L, p_.state_size, p_.z_L + puzzle * p_.state_size);
}

void Selection::offer(const Ended& t) {
  const WinnerKey key = winner_key(p_.select, t.status, t.score, t.q_halt, t.steps, 0, t.restart);
  Puzzle& puzzle = puzzles_[t.puzzle];
  const std::lock_guard lock(puzzle.mutex);
  if (p_.select == Select::vote) {
    Answer& answer = puzzle.answers[std::vector<int64_t>(t.preds, t.preds + p_.engine.tokens)];
    answer.votes += votes(t.status);
    if (answer.logits.empty() || before(key, answer.best)) {
      answer.logits.assign(t.logits, t.logits + p_.engine.tokens * p_.engine.vocabulary);
      if (p_.z_H) {
        answer.z_H.assign(t.z_H, t.z_H + p_.state_size);
        answer.z_L.assign(t.z_L, t.z_L + p_.state_size);
      }
      answer.best = key;
    }
  } else if (!puzzle.offered || before(key, puzzle.best)) {
    puzzle.offered = true;
    puzzle.best = key;
    choose(t.puzzle, t.restart, t.logits, t.z_H, t.z_L);
  }
}

void Selection::finish() {
  if (p_.select != Select::vote) return;
  const auto order = [](const auto& entry) {
    const Answer& answer = entry.second;
    return WinnerKey{answer.best.rank, -double(answer.votes), answer.best.second, answer.best.restart};
  };
  for (size_t n = 0; n < puzzles_.size(); ++n) {
    const auto& answers = puzzles_[n].answers;
    const auto best = std::min_element(answers.begin(), answers.end(),
                                       [&](const auto& a, const auto& b) { return before(order(a), order(b)); });
    if (best == answers.end()) continue;
    const Answer& answer = best->second;
    choose(int64_t(n), answer.best.restart, answer.logits.data(), answer.z_H.data(), answer.z_L.data());
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
