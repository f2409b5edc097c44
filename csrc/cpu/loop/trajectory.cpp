#include "cpu/loop/trajectory.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace eqr::cpu {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

int64_t ring_size(const FixedPoint& p) { return std::min(p.window, p.depth); }

}  // namespace

Trajectory::Trajectory(const FixedPoint& p)
    : p_(p), logits_(p.engine.tokens * p.engine.vocabulary), changes_(ring_size(p)) {}

int64_t Trajectory::bytes(const FixedPoint& p) {
  return sizeof(Trajectory) + sizeof(float) * (p.engine.tokens * p.engine.vocabulary + ring_size(p));
}

void Trajectory::begin(int64_t number) {
  number_ = number;
  steps_ = streak_ = checkpoint_ = turned_ = 0;
  cells_ = nullptr;
  status_ = kGoing;
  residual_ = q_halt_ = kNaN;
  std::fill(logits_.begin(), logits_.end(), 0.0f);
  std::fill(changes_.begin(), changes_.end(), kNaN);
}

void Trajectory::turn(const int64_t* cells) {
  cells_ = cells;
  turned_ = steps_;
  streak_ = 0;
}

void Trajectory::advance(const StepOutput& out) {
  const int64_t S = p_.engine.tokens, V = p_.engine.vocabulary;
  const auto before = [&](int64_t s) { return logits_.data() + (cells_ ? cells_[s] : s) * V; };
  residual_ = std::sqrt(residual_sq(out.change_sq, out.size_sq));
  q_halt_ = out.q_halt;
  bool finite = std::isfinite(residual_) && std::isfinite(q_halt_);
  double change = 0;
  for (int64_t s = 0; s < S; ++s) {
    const float *now = out.logits + s * V, *last = before(s);
    double sum = 0;
    for (int64_t i = 0; i < V; ++i) {
      const double difference = double(now[i]) - double(last[i]);
      sum += difference * difference;
      finite &= std::isfinite(now[i]);
    }
    change += std::sqrt(sum);
  }
  if (finite)
    for (int64_t s = 0; s < S; ++s) std::copy_n(out.logits + s * V, V, before(s));
  if (p_.residuals) p_.residuals[number_ * p_.depth + steps_] = residual_;
  // At depth 1 there is no difference yet: the residual stands in, and the first difference takes its place. So does
  // the difference over a turn for those after it.
  const int64_t since = steps_ - turned_;
  if (since == 0) std::fill(changes_.begin(), changes_.end(), kNaN);
  if (steps_ == 0)
    changes_[0] = residual_;
  else
    changes_[std::max<int64_t>(since - 1, 0) % changes_.size()] = float(change / double(S));
  ++steps_;
  streak_ = residual_ <= p_.tol ? streak_ + 1 : 0;
  status_ = status_after(p_, finite, q_halt_, streak_, steps_);
}

void Trajectory::cancel() {
  residual_ = kNaN;
  status_ = kCancelled;
}

void Trajectory::record() {
  const bool reached = checkpoint_ < p_.checkpoint_count && p_.checkpoints[checkpoint_] == steps_;
  if (going() && !reached) return;
  answer();
  if (reached) write(p_.at[checkpoint_++]);
  if (going()) return;
  write(p_.end);
  while (checkpoint_ < p_.checkpoint_count) write(p_.at[checkpoint_++]);
}

void Trajectory::answer() const {
  const int64_t S = p_.engine.tokens, V = p_.engine.vocabulary;
  int64_t* preds = p_.end.preds + number_ * S;
  for (int64_t s = 0; s < S; ++s) {
    const float* row = logits_.data() + s * V;
    preds[s] = std::max_element(row, row + V) - row;  // the first of equals
  }
}

Ended Trajectory::ended() const {
  return {.puzzle = puzzle(),
          .restart = restart(),
          .status = status_,
          .residual = residual_,
          .score = score(),
          .q_halt = q_halt_,
          .steps = steps_,
          .preds = p_.end.preds + number_ * p_.engine.tokens,
          .tokens = p_.engine.tokens,
          .logits = logits_.data()};
}

float Trajectory::score() const {
  double sum = 0;
  int64_t count = 0;
  for (float change : changes_)
    if (!std::isnan(change)) {
      sum += change;
      ++count;
    }
  return float(sum / double(count));  // NaN when there is none
}

// The answers are those in `end`, where `record` has just put them.
void Trajectory::write(const Records& to) const {
  const int64_t S = p_.engine.tokens;
  if (to.preds != p_.end.preds) std::copy_n(p_.end.preds + number_ * S, S, to.preds + number_ * S);
  to.q_halt[number_] = q_halt_;
  to.residual[number_] = residual_;
  to.score[number_] = score();
  to.steps[number_] = steps_;
  to.status[number_] = status_;
}

}  // namespace eqr::cpu
