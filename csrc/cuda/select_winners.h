// Which of a puzzle's trajectories is its answer, when all have ended: those of common/run_rules.h. A CTA takes a
// puzzle at a time.
#pragma once

#include "cuda/device.h"
#include "cuda/problem.h"

namespace eqr::cuda {

template <class Be>
struct SelectWinners {
  static constexpr int kThreads = 128;

  struct Shared {
    int64_t best[kThreads];  // the best restart of those that a thread has seen, or -1
  };

  const Problem& p;
  int64_t* winner;    // [N]
  float* logits;      // [N, S, V]
  uint64_t* ballots;  // [T], scratch

  EQR_DEVICE void run() const {
    for (int64_t puzzle = Be::cta(); puzzle < p.puzzles; puzzle += Be::ctas()) {
      if (p.select == Select::vote) count_votes(puzzle * p.breadth);
      const int64_t best = find(puzzle * p.breadth);
      if (Be::thread() == 0) winner[puzzle] = best;
      const int64_t size = p.shape.tokens * p.shape.vocabulary, from = puzzle * p.breadth + best;
      for (int64_t i = Be::thread(); i < size; i += kThreads) logits[puzzle * size + i] = p.logits[from * size + i];
      Be::sync();
    }
  }

 private:
  // Of a restart of the puzzle whose first trajectory is `base`. By vote, the best of an answer's trajectories stands
  // for all of them and has the least key of them: so the least of all trajectories is the winner.
  EQR_DEVICE WinnerKey key(int64_t base, int64_t restart) const {
    const int64_t t = base + restart;
    int64_t count = 0;
    if (p.select == Select::vote) {
      const uint64_t first = Be::load_relaxed(&ballots[t]) & kRestart;
      count = int64_t(Be::load_relaxed(&ballots[base + int64_t(first)]) / kVote);
    }
    return winner_key(p.select, p.end.status[t], p.end.score[t], p.end.q_halt[t], p.end.steps[t], count, restart);
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
    return before(key(base, b), key(base, a)) ? b : a;
  }

  // A trajectory's word in `ballots` has in its low half the first restart of the same answer, and in the word of that
  // one the high half counts the votes.
  static constexpr uint64_t kVote = uint64_t{1} << 32, kRestart = kVote - 1;

  EQR_DEVICE void count_votes(int64_t base) const {
    for (int64_t i = Be::thread(); i < p.breadth; i += kThreads) {
      int64_t first = 0;
      while (first < i && !same(base + first, base + i)) ++first;
      ballots[base + i] = uint64_t(first);
    }
    Be::sync();
    for (int64_t i = Be::thread(); i < p.breadth; i += kThreads)
      if (votes(p.end.status[base + i]))
        Be::atomic_add(&ballots[base + int64_t(Be::load_relaxed(&ballots[base + i]) & kRestart)], kVote);
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
