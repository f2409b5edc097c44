// An open run with threads of its own, and what it has to say until somebody asks. Knows neither torch nor Python.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cpu/loop/open_run.h"
#include "cpu/packed.h"
#include "torch/ended.h"

namespace eqr {

// Of a problem: all of it has begun, a trajectory has taken an outer step, or it has ended.
struct RunEvent {
  enum class Kind { begun, step, done };

  int64_t number;
  Kind kind;
  cpu::Outcome outcome{};
  std::string error{};             // of an outcome `failed`
  std::shared_ptr<void> memory{};  // of one that has ended: `Guest::memory`
  EndedTrajectory trajectory{};    // of a step; its status is kGoing where it goes on
};

class ServedRun {
 public:
  // Of whoever makes one and asks for it by this number.
  static std::shared_ptr<ServedRun> make(int threads, int64_t quantum, int64_t in_flight, cpu::Policy, int64_t* handle);
  static std::shared_ptr<ServedRun> of(int64_t handle);  // throws std::invalid_argument

  // Returns when all that joined has come to its end. Not in a forked child, which has none of the threads.
  ~ServedRun();
  ServedRun(const ServedRun&) = delete;
  ServedRun& operator=(const ServedRun&) = delete;

  // The problem as cpu::Joining has it, and all that it points to.
  struct Guest {
    cpu::Joining joining;
    std::vector<int64_t> checkpoints;
    std::vector<Records> at;
    bool steps;                    // whether each outer step is an event
    std::shared_ptr<void> memory;  // all else; it is let go where the event of the end is taken
  };
  void join(Guest, const cpu::Packed&);
  void cancel(int64_t number) { run_.cancel(number); }
  cpu::OpenRun::Counts counts() const { return run_.counts(); }
  // Waits until there is an event, or the run was closed and all its threads have ended: none then.
  std::vector<RunEvent> take();
  // Nobody joins any more; what is there comes to its end.
  void close() { run_.close(); }

 private:
  ServedRun(int threads, int64_t quantum, int64_t in_flight, cpu::Policy);

  void work();
  void push(RunEvent);
  int64_t layout_of(const cpu::Packed&);

  cpu::OpenRun run_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<RunEvent> events_;
  std::map<int64_t, Guest> guests_;   // by number
  std::vector<cpu::Packed> layouts_;  // the heads of packed weights seen so far
  int working_;
  std::vector<std::thread> threads_;
};

}  // namespace eqr
