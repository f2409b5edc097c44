// One trajectory in flight: halting, scoring and recording, by common/run_rules.h, as in cpu/loop/trajectory.cpp.
// `Control` is written by one thread, the leader; the others read it behind a barrier.
#pragma once

#include "cuda/device.h"
#include "cuda/problem.h"

namespace eqr::cuda {

struct Control {
  int64_t number, puzzle, restart;
  int64_t steps, streak;
  int64_t left;  // outer steps of the quantum
  Status status;
  float residual, q_halt, score;
  int32_t live;         // a trajectory is in flight
  int32_t checkpoint;   // the next one
  int32_t first, last;  // checkpoints to be written now: [first, last)
  int32_t ended;
  int32_t leaves;  // it has ended or its quantum is over: how it stands is written too
  int32_t logits;  // which of the two buffers holds the last finite logits
};
static_assert(sizeof(Control) % 8 == 0);

// What an outer step came to.
struct StepSums {
  float change_sq, size_sq;  // of the states
  double logits_change;      // sum over tokens of ||logits - logits of the step before||
  float q_halt;
  bool finite;  // all logits
};

template <class Be>
struct Trajectory {
  const Problem& p;
  Control& c;
  float* changes;  // [min(window, depth)], a ring

  // Takes the next trajectory that there is something to do for; those that cannot start are recorded by the leader
  // alone. False when the queue is empty.
  EQR_DEVICE bool take() {
    for (;;) {
      const uint64_t next = Be::atomic_add(&p.counters->queue, 1);
      if (next >= uint64_t(p.count)) return false;
      const int64_t number = p.parked ? p.rows[next] : int64_t(next);
      if (p.parked && p.parked[number].live) {
        c = p.parked[number];
        c.left = p.quantum;
        return true;
      }
      begin(number);
      if (!cancelled() && !hopeless()) return true;
      c.status = kCancelled;
      record_unstarted();
      count_finished();
    }
  }

  EQR_DEVICE void begin(int64_t number) {
    c.number = number;
    c.puzzle = number / p.breadth;
    c.restart = number % p.breadth;
    c.steps = c.streak = 0;
    c.left = p.parked ? p.quantum : p.depth;
    c.status = kGoing;
    c.residual = c.q_halt = c.score = nan();
    c.checkpoint = c.first = c.last = c.ended = c.leaves = c.logits = 0;
  }

  // The caller wants no more: the trajectory keeps the answer that it has. Before an outer step.
  EQR_DEVICE void cancel() {
    c.residual = nan();
    c.status = kCancelled;
    plan_records();
    count_finished();
  }

  EQR_DEVICE void advance(const StepSums& s) {
    c.residual = Be::sqrt(residual_sq(s.change_sq, s.size_sq));
    c.q_halt = s.q_halt;
    const bool finite = s.finite && is_finite(c.residual) && is_finite(c.q_halt);
    if (finite) c.logits ^= 1;
    if (p.residuals) p.residuals[c.number * p.depth + c.steps] = c.residual;
    // At depth 1 there is no difference yet: the residual stands in, and the first difference takes its place.
    if (c.steps == 0)
      changes[0] = c.residual;
    else
      changes[(c.steps - 1) % ring()] = float(s.logits_change / double(p.shape.tokens));
    ++c.steps;
    --c.left;
    c.streak = c.residual <= p.tol ? c.streak + 1 : 0;
    c.status = status_after(p, finite, c.q_halt, c.streak, c.steps);
    c.score = score();
    if (is_race(p)) {
      if (settled(c.status))
        Be::atomic_min(&p.best[c.puzzle], place_in_race(c.steps, c.restart));
      else if (c.status == kGoing && hopeless())
        c.status = kCancelled;
    }
    plan_records();
    publish(2, Be::atomic_add(&p.counters->spent, 1) + 1);
    if (c.ended) count_finished();
  }

  EQR_DEVICE bool cancelled() const { return p.control && Be::load_system(p.control) != 0; }

  // Settling at the next step would already be too late.
  EQR_DEVICE bool hopeless() const {
    return is_race(p) && place_in_race(c.steps + 1, c.restart) > Be::load_relaxed(&p.best[c.puzzle]);
  }

  // By `threads` threads: what `plan_records` has asked for. logits: [S, V], the last finite ones; null before the
  // first step.
  EQR_DEVICE void record(int thread, int threads, const float* logits) const {
    const int64_t S = p.shape.tokens, V = p.shape.vocabulary, T = p.puzzles * p.breadth;
    if (!c.leaves && c.first == c.last) return;
    for (int64_t s = thread; s < S; s += threads) {
      int64_t best = 0;
      for (int64_t v = 1; logits && v < V; ++v)
        if (logits[s * V + v] > logits[s * V + best]) best = v;
      for (int i = c.first; i < c.last; ++i) p.at.preds[(i * T + c.number) * S + s] = best;
      if (c.leaves) p.end.preds[c.number * S + s] = best;
    }
    if (c.leaves)
      for (int64_t i = thread; i < S * V; i += threads) p.logits[c.number * S * V + i] = logits ? logits[i] : 0.0f;
    if (thread == 0) {
      for (int i = c.first; i < c.last; ++i) write(p.at, i * T + c.number);
      if (c.leaves) write(p.end, c.number);
    }
  }

  // By the leader, when all of one that leaves is recorded.
  EQR_DEVICE void leave() {
    c.live = 0;
    if (!p.parked) return;
    p.parked[c.number] = c;
    p.parked[c.number].live = !c.ended;
  }

 private:
  EQR_DEVICE static float nan() {
    const uint32_t bits = 0x7FC00000u;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  EQR_DEVICE static bool is_finite(float x) { return x - x == 0.0f; }

  EQR_DEVICE int64_t ring() const { return p.window < p.depth ? p.window : p.depth; }

  EQR_DEVICE float score() const {
    const int64_t differences = c.steps > 1 ? c.steps - 1 : 1;
    double sum = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < differences && i < ring(); ++i)
      if (changes[i] == changes[i]) {
        sum += changes[i];
        ++count;
      }
    return float(sum / double(count));
  }

  // Which checkpoints have just been reached; once ended, all later ones too.
  EQR_DEVICE void plan_records() {
    c.ended = c.status != kGoing;
    c.leaves = c.ended || c.left == 0;
    c.first = c.last = c.checkpoint;
    if (c.last < p.checkpoint_count && p.checkpoints[c.last] == c.steps) ++c.last;
    if (c.ended) c.last = p.checkpoint_count;
    c.checkpoint = c.last;
  }

  EQR_DEVICE void record_unstarted() {
    plan_records();
    record(0, 1, nullptr);
  }

  EQR_DEVICE void write(const Records& to, int64_t row) const {
    to.q_halt[row] = c.q_halt;
    to.residual[row] = c.residual;
    to.score[row] = c.score;
    to.steps[row] = c.steps;
    to.status[row] = c.status;
  }

  EQR_DEVICE void count_finished() { publish(1, Be::atomic_add(&p.counters->finished, 1) + 1); }

  EQR_DEVICE void publish(int what, uint64_t total) {
    if (p.control) Be::store_system(p.control + what, int64_t(total));
  }
};

}  // namespace eqr::cuda
