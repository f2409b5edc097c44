#include "cpu/loop/flight.h"

#include <algorithm>
#include <atomic>

namespace eqr::cpu {
namespace {

int64_t kept_floats(const FixedPoint& p) { return p.z_H || p.turn_cells ? p.state_size : 0; }
int64_t moved_floats(const FixedPoint& p) { return p.turn_cells ? p.state_size : 0; }
int64_t moved_cells(const FixedPoint& p) { return p.turn_cells ? p.engine.tokens : 0; }

}  // namespace

Flight::Flight(const FixedPoint& p, Race* race)
    : trajectory(p),
      p_(p),
      race_(race),
      z_H_(kept_floats(p)),
      z_L_(kept_floats(p)),
      tokens_(moved_cells(p)),
      places_(moved_cells(p)),
      moved_(moved_floats(p)) {}

int64_t Flight::bytes(const FixedPoint& p) {
  const int64_t states = int64_t(sizeof(float)) * (2 * kept_floats(p) + moved_floats(p));
  const int64_t cells = 2 * int64_t(sizeof(int64_t)) * moved_cells(p);
  return int64_t(sizeof(Flight)) - int64_t(sizeof(Trajectory)) + Trajectory::bytes(p) + states + cells;
}

void Flight::begin(int64_t number) {
  trajectory.begin(number);
  const int64_t puzzle = trajectory.puzzle();
  input_ = {.tokens = p_.tokens + puzzle * p_.engine.tokens,
            .rng = {p_.seed, trajectory.restart(), p_.ids[puzzle], 0},
            .noise_scale = p_.noise_scale};
  if (p_.start_rng) std::copy_n(p_.start_rng + 4 * number, 4, input_.rng);
  before_ = input_.rng[3];
  parked_ = false;
}

bool Flight::hopeless() const {
  const Trajectory& t = trajectory;
  return race_ && race_->cannot_win(t.puzzle(), t.restart(), t.steps());
}

void Flight::enter(OpenTeam& team, void* workspace) {
  const Engine& engine = p_.engine;
  if (parked_) return engine.put_state(engine.packed, workspace, z_H_.data(), z_L_.data());
  if (!p_.start_H) return team.call(engine.start, engine.packed, workspace, input_);
  const int64_t at = trajectory.number() * p_.state_size;
  engine.put_state(engine.packed, workspace, p_.start_H + at, p_.start_L + at);
}

void Flight::park(const void* workspace) {
  z_H_.resize(size_t(p_.state_size));
  z_L_.resize(size_t(p_.state_size));
  p_.engine.get_state(p_.engine.packed, workspace, z_H_.data(), z_L_.data());
  parked_ = true;
}

void Flight::step(OpenTeam& team, void* workspace) {
  Trajectory& t = trajectory;
  input_.rng[3] = before_ + t.steps();
  team.call(p_.engine.outer_step, p_.engine.packed, workspace, input_);
  count(2);
  t.advance(*static_cast<const StepOutput*>(workspace));
  if (race_ && settled(t.status())) race_->settled(t.puzzle(), t.restart(), t.steps());
  if (t.going() && hopeless()) t.lose();
  if (!t.going()) return;
  t.record();
  if (p_.turn_cells && t.steps() % p_.turn_every == 0) turn(workspace);
}

void Flight::turn(void* workspace) {
  Trajectory& t = trajectory;
  const int64_t S = p_.engine.tokens, features = p_.state_size / S, last = t.steps() / p_.turn_every - 1;
  const auto cells = [&](int64_t turn) {
    return p_.turn_cells + (t.puzzle() * p_.turn_count + turn % p_.turn_count) * S;
  };
  const int64_t *before = cells(last), *after = cells(last + 1), *puzzle = p_.tokens + t.puzzle() * S;
  // Before the first turn a puzzle's cells are its own.
  for (int64_t s = 0; s < S; ++s) places_[last ? before[s] : s] = s;
  for (int64_t s = 0; s < S; ++s) tokens_[s] = puzzle[after[s]];
  input_.tokens = tokens_.data();
  p_.engine.get_state(p_.engine.packed, workspace, z_H_.data(), z_L_.data());
  for (std::vector<float>* z : {&z_H_, &z_L_}) {
    for (int64_t s = 0; s < S; ++s)
      std::copy_n(z->data() + places_[after[s]] * features, features, moved_.data() + s * features);
    z->swap(moved_);
  }
  p_.engine.put_state(p_.engine.packed, workspace, z_H_.data(), z_L_.data());
  t.turn(after);
}

Ended Flight::end(const void* workspace) {
  trajectory.record();
  Ended ended = trajectory.ended();
  if (p_.z_H) {
    if (!trajectory.steps()) {
      std::fill(z_H_.begin(), z_H_.end(), 0.0f);
      std::fill(z_L_.begin(), z_L_.end(), 0.0f);
    } else if (workspace) {
      p_.engine.get_state(p_.engine.packed, workspace, z_H_.data(), z_L_.data());
    }
    ended.z_H = z_H_.data(), ended.z_L = z_L_.data();
  }
  return ended;
}

void Flight::count(int what) const { std::atomic_ref(p_.control[what]).fetch_add(1, std::memory_order_relaxed); }

}  // namespace eqr::cpu
