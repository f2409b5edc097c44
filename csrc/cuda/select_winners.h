// Which of a puzzle's trajectories is its answer, when all have ended: the rules of csrc/cpu/selection.h. A CTA takes a
// puzzle at a time.
#pragma once

#include "device.h"
#include "problem.h"

namespace eqr::cuda {

// What a rule compares, least first. Holds no NaN.
struct WinnerKey {
  double rank, first, second;
  int64_t restart;

  EQR_DEVICE bool before(const WinnerKey& other) const {
    if (rank != other.rank) return rank < other.rank;
    if (first != other.first) return first < other.first;
    if (second != other.second) return second < other.second;
    return restart < other.restart;
  }
};

template <class Be>
struct SelectWinners {
  static constexpr int kThreads = 128;

  struct Shared {
    int64_t best[kThreads];  // the best restart of those that a thread has seen, or -1
  };

  const Problem& p;
  Select rule;
  int64_t* winner;  // [N]
  float* logits;    // [N, S, V]
  uint64_t* votes;  // [T], scratch

  EQR_DEVICE void run() const {
    for (int64_t puzzle = Be::cta(); puzzle < p.puzzles; puzzle += Be::ctas()) {
      if (rule == Select::vote) count_votes(puzzle * p.breadth);
      const int64_t best = find(puzzle * p.breadth);
      if (Be::thread() == 0) winner[puzzle] = best;
      const int64_t size = p.shape.tokens * p.shape.vocabulary, from = puzzle * p.breadth + best;
      for (int64_t i = Be::thread(); i < size; i += kThreads) logits[puzzle * size + i] = p.logits[from * size + i];
      Be::sync();
    }
  }

 private:
  static constexpr double kMost = 1.7976931348623157e308, kMore = __builtin_huge_val();

  // Infinities become the largest numbers, on the near side of what NaN becomes.
  EQR_DEVICE static double finite_or(float x, double nan) {
    if (x != x) return nan;
    const double wide = double(x);
    return wide > kMost ? kMost : wide < -kMost ? -kMost : wide;
  }
  EQR_DEVICE static bool voted(int64_t status) { return status != kDiverged && status != kCancelled; }
  EQR_DEVICE static bool settled(int64_t status) { return status == kConverged || status == kHalted; }

  // Of a restart of the puzzle whose first trajectory is `base`. By vote, the best of an answer's trajectories stands
  // for all of them and has the least key of them: so the least of all trajectories is the winner.
  EQR_DEVICE WinnerKey key(int64_t base, int64_t restart) const {
    const int64_t t = base + restart, status = p.end.status[t];
    const double rank = status == kDiverged ? 2 : status == kCancelled ? 1 : 0;
    const double low_score = finite_or(p.end.score[t], kMore), unsettled = settled(status) ? 0 : 1;
    switch (rule) {
      case Select::vote: {
        const uint64_t first = Be::load_relaxed(&votes[t]) & kRestart;
        return {rank, -double(Be::load_relaxed(&votes[base + int64_t(first)]) / kVote), low_score, restart};
      }
      case Select::q: return {rank, -finite_or(p.end.q_halt[t], -kMore), low_score, restart};
      case Select::first: return {rank, unsettled, settled(status) ? double(p.end.steps[t]) : low_score, restart};
      default: return {rank, unsettled, low_score, restart};
    }
  }

  EQR_DEVICE int64_t find(int64_t base) const {
    int64_t* const best = reinterpret_cast<Shared*>(Be::shared())->best;
    const int thread = Be::thread();
    int64_t mine = thread < p.breadth ? thread : -1;
    for (int64_t i = int64_t{thread} + kThreads; i < p.breadth; i += kThreads) mine = better(base, mine, i);
    best[thread] = mine;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      Be::sync();
      if (thread < half && best[thread + half] >= 0) best[thread] = better(base, best[thread], best[thread + half]);
    }
    Be::sync();
    return best[0];
  }

  EQR_DEVICE int64_t better(int64_t base, int64_t a, int64_t b) const {
    return key(base, b).before(key(base, a)) ? b : a;
  }

  // A trajectory's word in `votes` has in its low half the first restart of the same answer, and in the word of that
  // one the high half counts the votes.
  static constexpr uint64_t kVote = uint64_t{1} << 32, kRestart = kVote - 1;

  EQR_DEVICE void count_votes(int64_t base) const {
    for (int64_t i = Be::thread(); i < p.breadth; i += kThreads) {
      int64_t first = 0;
      while (first < i && !same(base + first, base + i)) ++first;
      votes[base + i] = uint64_t(first);
    }
    Be::sync();
    for (int64_t i = Be::thread(); i < p.breadth; i += kThreads)
      if (voted(p.end.status[base + i]))
        Be::atomic_add(&votes[base + int64_t(Be::load_relaxed(&votes[base + i]) & kRestart)], kVote);
    Be::sync();
  }

  EQR_DEVICE bool same(int64_t a, int64_t b) const {
    const int64_t S = p.shape.tokens, *of_a = p.end.preds + a * S, *of_b = p.end.preds + b * S;
    for (int64_t i = 0; i < S; ++i)
      if (of_a[i] != of_b[i]) return false;
    return true;
  }
};

}  // namespace eqr::cuda
