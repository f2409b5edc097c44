#include "cpu/loop/fixed_point.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <exception>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/loop/backoff.h"
#include "cpu/loop/open_team.h"
#include "cpu/loop/selection.h"
#include "cpu/loop/trajectory.h"
#include "cpu/loop/workspace.h"

namespace eqr::cpu {
namespace {

// A place for one trajectory at a time.
struct Slot {
  explicit Slot(const FixedPoint& p)
      : workspace(p.engine.workspace_bytes),
        trajectory(p),
        z_H(p.z_H ? p.state_size : 0),
        z_L(p.z_H ? p.state_size : 0) {}

  OpenTeam team;
  Workspace workspace;
  Trajectory trajectory;
  std::vector<float> z_H, z_L;  // [S, d], its state when it has ended, where these are kept
};

// The caller's `poll`, which costs more than a look at the clock.
class Poll {
 public:
  explicit Poll(bool (*function)()) : function_(function) {}

  // False once: after that it asks no more.
  bool operator()() {
    if (!function_ || Clock::now() < next_) return true;
    const auto function = std::exchange(function_, nullptr);
    if (!function()) return false;
    function_ = function;
    next_ = Clock::now() + kInterval;
    return true;
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kInterval{20};

  bool (*function_)();
  Clock::time_point next_ = Clock::now() + kInterval;
};

int64_t slot_count(const FixedPoint& p, int workers) {
  return std::min({int64_t{workers}, p.slots, p.puzzles * p.breadth});
}

}  // namespace

class FixedPointRun::State {
 public:
  State(const FixedPoint& p, int workers) : p_(p), trajectories_(p.puzzles * p.breadth), selection_(p_) {
    if (is_race(p)) race_.emplace(p.puzzles);
    for (int64_t i = 0; i < slot_count(p, workers); ++i) slots_.emplace_back(p_);
  }

  void work(bool (*function)()) noexcept {
    Poll poll(function);
    own(poll);
    help(poll);
  }

  void finish() {
    if (error_) std::rethrow_exception(error_);
    selection_.finish();
  }

 private:
  // Runs trajectories of the queue in a slot of its own, if there is one left, until the queue is empty.
  void own(Poll& poll) {
    // Busy first: who finds no slot, or no trajectory, leaves when nobody is busy.
    busy_.fetch_add(1);
    const int64_t i = taken_slots_.fetch_add(1);
    if (i < int64_t(slots_.size())) {
      Slot& slot = slots_[size_t(i)];
      try {
        slot.workspace.clear();
        slot.team.open();
        for (int64_t t; (t = queue_.fetch_add(1)) < trajectories_;) run(slot, t, poll);
      } catch (...) {
        fail(std::current_exception());
      }
      slot.team.close();
    }
    busy_.fetch_sub(1);
  }

  void run(Slot& slot, int64_t number, Poll& poll) {
    Trajectory& t = slot.trajectory;
    t.begin(number);
    if (cancelled(poll))
      t.cancel();
    else if (hopeless(t))
      t.lose();
    else
      iterate(slot, poll);
    t.record();
    Ended ended = t.ended();
    if (p_.z_H) {
      keep_state(slot);
      ended.z_H = slot.z_H.data(), ended.z_L = slot.z_L.data();
    }
    selection_.offer(ended);
    if (p_.on_end) p_.on_end(p_.on_end_context, ended);
    count(1, 1);
  }

  void keep_state(Slot& slot) {
    if (slot.trajectory.steps()) {
      p_.engine.get_state(p_.engine.packed, slot.workspace.data(), slot.z_H.data(), slot.z_L.data());
    } else {
      std::fill(slot.z_H.begin(), slot.z_H.end(), 0.0f);
      std::fill(slot.z_L.begin(), slot.z_L.end(), 0.0f);
    }
  }

  void begin(Slot& slot, StepInput& input) {
    const Engine& engine = p_.engine;
    void* workspace = slot.workspace.data();
    if (!p_.start_H) return slot.team.call(engine.start, engine.packed, workspace, input);
    const int64_t number = slot.trajectory.number(), at = number * p_.state_size;
    std::copy_n(p_.start_rng + 4 * number, 4, input.rng);
    engine.put_state(engine.packed, workspace, p_.start_H + at, p_.start_L + at);
  }

  void iterate(Slot& slot, Poll& poll) {
    const Engine& engine = p_.engine;
    Trajectory& t = slot.trajectory;
    StepInput input{.tokens = p_.tokens + t.puzzle() * engine.tokens,
                    .rng = {p_.seed, t.restart(), p_.ids[t.puzzle()], 0},
                    .noise_scale = p_.noise_scale};
    void* workspace = slot.workspace.data();
    begin(slot, input);
    const int64_t before = input.rng[3];
    while (t.going()) {
      if (cancelled(poll)) return t.cancel();
      input.rng[3] = before + t.steps();
      slot.team.call(engine.outer_step, engine.packed, workspace, input);
      count(2, 1);
      t.advance(*static_cast<const StepOutput*>(workspace));
      if (race_ && settled(t.status())) race_->settled(t.puzzle(), t.restart(), t.steps());
      if (t.going() && hopeless(t)) t.lose();
      if (t.going()) t.record();
    }
  }

  // Joins the team that has the fewest, wherever a trajectory is still going.
  void help(Poll& poll) {
    for (Backoff backoff; busy_.load(); backoff.pause()) {
      OpenTeam::Ticket ticket;
      if (OpenTeam* team = join(&ticket)) {
        serve(*team, ticket, poll);
        backoff = {};
      }
      cancelled(poll);
    }
  }

  OpenTeam* join(OpenTeam::Ticket* ticket) {
    OpenTeam* smallest = nullptr;
    int size = 0;
    for (Slot& slot : slots_)
      if (const int s = slot.team.size(); s && (!smallest || s < size)) {
        smallest = &slot.team;
        size = s;
      }
    return smallest && smallest->join(size, ticket) ? smallest : nullptr;
  }

  void serve(OpenTeam& team, OpenTeam::Ticket ticket, Poll& poll) {
    for (Backoff backoff;;) {
      switch (team.serve(&ticket)) {
        case OpenTeam::Turn::closed: return;
        case OpenTeam::Turn::served: backoff = {}; break;
        case OpenTeam::Turn::none: backoff.pause();
      }
      cancelled(poll);
    }
  }

  bool hopeless(const Trajectory& t) const { return race_ && race_->cannot_win(t.puzzle(), t.restart(), t.steps()); }

  bool cancelled(Poll& poll) {
    // Caught here: a member that left its team would be waited for.
    try {
      if (!poll()) cancelled_.store(true, std::memory_order_relaxed);
    } catch (...) {
      fail(std::current_exception());
    }
    return cancelled_.load(std::memory_order_relaxed) ||
           std::atomic_ref(p_.control[0]).load(std::memory_order_relaxed) != 0;
  }

  void count(int what, int64_t more) { std::atomic_ref(p_.control[what]).fetch_add(more, std::memory_order_relaxed); }

  void fail(std::exception_ptr error) {
    const std::lock_guard lock(error_mutex_);
    if (!error_) error_ = error;
    cancelled_.store(true, std::memory_order_relaxed);
  }

  const FixedPoint p_;
  const int64_t trajectories_;
  Selection selection_;
  std::optional<Race> race_;
  std::deque<Slot> slots_;
  std::atomic<int64_t> taken_slots_{0}, queue_{0};
  std::atomic<int> busy_{0};
  std::atomic<bool> cancelled_{false};
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

FixedPointRun::FixedPointRun(const FixedPoint& p, int workers) : state_(std::make_unique<State>(p, workers)) {}
FixedPointRun::~FixedPointRun() = default;
void FixedPointRun::work(bool (*poll)()) noexcept { state_->work(poll); }
void FixedPointRun::finish() { state_->finish(); }

int64_t FixedPointRun::bytes_per_trajectory(const FixedPoint& p) {
  const int64_t states = p.z_H ? 2 * int64_t(sizeof(float)) * p.state_size : 0;
  return p.engine.workspace_bytes + int64_t(sizeof(Slot)) - int64_t(sizeof(Trajectory)) + Trajectory::bytes(p) + states;
}

}  // namespace eqr::cpu
