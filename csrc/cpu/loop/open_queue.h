// The problems of an open run, and whose turn it is. For one thread at a time, but where it says otherwise.
#pragma once

#include <stdint.h>

#include <atomic>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "cpu/loop/flight.h"
#include "cpu/loop/open_run.h"

namespace eqr::cpu {

struct Running;

struct Job {
  explicit Job(const Joining&);

  const FixedPoint& problem() const { return joining.problem; }
  int64_t trajectories() const { return problem().puzzles * problem().breadth; }
  // Its trajectories go on side by side, the one with the fewest steps first: a race, or somebody looks on. Those of
  // others end one after another, which keeps fewer states.
  bool abreast() const { return race || joining.on_step; }
  // From any thread: its trajectories are to go no further.
  bool stopped() const;

  const Joining joining;
  Selection selection;
  std::optional<Race> race;
  std::atomic<bool> stop{false};
  Outcome outcome = Outcome::complete;  // another one: what it has not begun or has parked is forgotten
  std::exception_ptr error;

  // The queue's.
  int64_t place = 0;    // in the order of arrival
  int64_t rank = 0;     // lower ones are served first
  int64_t service = 0;  // outer steps so far
  int64_t begun = 0, ended = 0, in_hand = 0;
  std::vector<std::unique_ptr<Running>> parked;
};

// A trajectory and the problem that it belongs to.
struct Running {
  Running(std::shared_ptr<Job>, int64_t number);

  const std::shared_ptr<Job> job;
  Flight flight;
  bool announced = false;
  bool entered = false;  // its state is in the workspace of the thread that has it in hand
};

class OpenQueue {
 public:
  OpenQueue(Policy, int64_t quantum, int64_t in_flight, int64_t threads);

  void add(std::shared_ptr<Job>);
  std::shared_ptr<Job> find(int64_t number) const;  // null where it has left
  bool empty() const { return jobs_.empty(); }
  int64_t in_flight() const { return in_flight_; }

  // Whether a trajectory is ready that nobody has in hand.
  bool waits() const { return first() != nullptr; }
  // The trajectory whose turn it is, in hand from now on; null where it is that of `current`, nobody waits, or there is
  // no memory for it: its problem has failed then.
  std::unique_ptr<Running> take(const Running* current);
  std::shared_ptr<Job> failed();  // a problem that has failed so, and is to leave; or null
  void park(std::unique_ptr<Running>);
  void served(Job&, int64_t steps);
  // It is in hand and has ended.
  void end(Job&);
  // It goes no further: what it has parked or not begun is forgotten, and what is in hand ends.
  void drop(Job&, Outcome, std::exception_ptr = nullptr);
  // The job itself once nothing of it is left, which leaves the queue then; else null.
  std::shared_ptr<Job> leave(Job&);

 private:
  using Turns = std::set<std::pair<std::pair<int64_t, int64_t>, Job*>>;  // by rank and place

  static auto turn(Job& job) { return std::pair(std::pair(job.rank, job.place), &job); }
  int64_t rank(const Job&) const;
  void list(Job&);
  void unlist(Job&);
  bool may_begin(const Job&) const;  // whether it has a trajectory that may begin now
  Job* first() const;
  std::unique_ptr<Running> take_from(Job&);

  const Policy policy_;
  const int64_t quantum_, limit_, share_;
  int64_t in_flight_ = 0, arrivals_ = 0, failed_ = 0;
  std::map<int64_t, std::shared_ptr<Job>> jobs_;  // by number
  Turns parked_, fresh_;                          // that have a parked trajectory; that have one which has not begun
};

}  // namespace eqr::cpu
