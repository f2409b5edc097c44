#include "cpu/loop/fixed_point.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <exception>
#include <mutex>
#include <optional>
#include <vector>

#include "cpu/loop/backoff.h"
#include "cpu/loop/flight.h"
#include "cpu/loop/open_team.h"
#include "cpu/loop/poll.h"
#include "cpu/loop/selection.h"
#include "cpu/loop/workspace.h"

namespace eqr::cpu {
namespace {

// A place for one trajectory at a time.
struct Slot {
  Slot(const FixedPoint& p, Race* race) : workspace(p.engine.workspace_bytes), flight(p, race) {}

  OpenTeam team;
  Workspace workspace;
  Flight flight;
};

int64_t slot_count(const FixedPoint& p, int workers) {
  return std::min({int64_t{workers}, p.slots, p.puzzles * p.breadth});
}

}  // namespace

class FixedPointRun::State {
 public:
  State(const FixedPoint& p, int workers) : p_(p), trajectories_(p.puzzles * p.breadth), selection_(p_) {
    if (is_race(p)) race_.emplace(p.puzzles);
    for (int64_t i = 0; i < slot_count(p, workers); ++i) slots_.emplace_back(p_, race_ ? &*race_ : nullptr);
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
    Flight& flight = slot.flight;
    flight.begin(number);
    if (cancelled(poll))
      flight.trajectory.cancel();
    else if (flight.hopeless())
      flight.trajectory.lose();
    else
      iterate(slot, poll);
    const Ended ended = flight.end(slot.workspace.data());
    selection_.offer(ended);
    if (p_.on_end) p_.on_end(p_.on_end_context, ended);
    flight.finish();
  }

  void iterate(Slot& slot, Poll& poll) {
    Flight& flight = slot.flight;
    flight.enter(slot.team, slot.workspace.data());
    while (flight.trajectory.going()) {
      if (cancelled(poll)) return flight.trajectory.cancel();
      flight.step(slot.team, slot.workspace.data());
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
  return p.engine.workspace_bytes + int64_t(sizeof(Slot)) - int64_t(sizeof(Flight)) + Flight::bytes(p);
}

}  // namespace eqr::cpu
