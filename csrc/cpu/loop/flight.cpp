#include "cpu/loop/flight.h"

#include <algorithm>
#include <atomic>

namespace eqr::cpu {
namespace {

int64_t kept_floats(const FixedPoint& p) { return p.z_H ? p.state_size : 0; }

}  // namespace

Flight::Flight(const FixedPoint& p, Race* race)
    : trajectory(p), p_(p), race_(race), z_H_(kept_floats(p)), z_L_(kept_floats(p)) {}

int64_t Flight::bytes(const FixedPoint& p) {
  const int64_t states = 2 * int64_t(sizeof(float)) * kept_floats(p);
  return int64_t(sizeof(Flight)) - int64_t(sizeof(Trajectory)) + Trajectory::bytes(p) + states;
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
  if (t.going()) t.record();
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
