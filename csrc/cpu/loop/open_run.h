// A fixed-point run that stays: problems join it while it goes on, and each leaves when its trajectories have ended.
// The threads of the run take turns: a trajectory that has had its outer steps gives its place to one that waits.
#pragma once

#include <stdint.h>

#include <exception>
#include <limits>
#include <memory>

#include "cpu/loop/fixed_point.h"
#include "cpu/loop/selection.h"

namespace eqr::cpu {

// Who is next: the problem that has had the least outer steps, in quanta; or the one that came first.
enum class Policy : int32_t { least_service, fifo };

// A problem as it joins the run. All that it points to must stay until it has ended.
struct Joining {
  FixedPoint problem;  // its `slots` is not looked at
  int64_t number;      // the caller's, each once
  int64_t layout = 0;  // equal for problems whose engines lay out a workspace alike
  // Called by any of the threads after each outer step; or null. `status` is kGoing where it goes on.
  void (*on_step)(void* context, int64_t number, const Ended&) = nullptr;
  void* on_step_context = nullptr;
};

enum class Outcome : int32_t { complete, cancelled, failed };

class OpenRun {
 public:
  static constexpr int64_t kWhole = std::numeric_limits<int64_t>::max();

  struct Options {
    int threads = 1;             // that may call `work`, each of which runs a trajectory of its own or helps another
    int64_t quantum = kWhole;    // outer steps that a trajectory takes while others wait
    int64_t in_flight = kWhole;  // trajectories with a state at most
    Policy policy = Policy::least_service;
    // Called by any of the threads: when the last trajectory of a problem begins; and when a problem has ended and is
    // forgotten, `error` being what a thread threw over it.
    void (*on_begun)(void* context, int64_t number) = nullptr;
    void (*on_done)(void* context, int64_t number, Outcome, std::exception_ptr error) = nullptr;
    void* context = nullptr;
  };
  struct Counts {
    int64_t in_flight;    // trajectories with a state
    int64_t steps;        // outer steps of all problems so far
    double busy_seconds;  // of all threads together, in outer steps
  };

  explicit OpenRun(const Options&);
  ~OpenRun();
  OpenRun(const OpenRun&) = delete;
  OpenRun& operator=(const OpenRun&) = delete;

  // All of these from any thread.
  void join(const Joining&);
  // It ends at the next outer step, and what it has written by then means nothing.
  void cancel(int64_t number);
  // Nobody joins any more: `work` returns when the last problem has ended.
  void close();
  Counts counts() const;

  // Each thread of the run calls it once.
  void work() noexcept;

 private:
  class State;
  std::unique_ptr<State> state_;
};

}  // namespace eqr::cpu
