#include "torch/served_run.h"

#include <cstring>
#include <stdexcept>
#include <utility>

#include "torch/floating_point.h"

namespace eqr {
namespace {

struct Registry {
  std::mutex mutex;
  std::map<int64_t, std::weak_ptr<ServedRun>> runs;
  int64_t next = 1;
};

Registry& registry() {
  static Registry* const all = new Registry;  // it outlives the runs of static objects
  return *all;
}

std::string what(const std::exception_ptr& error) {
  if (!error) return "";
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& e) {
    return e.what();
  } catch (...) {
    return "an exception of unknown type";
  }
}

}  // namespace

std::shared_ptr<ServedRun> ServedRun::make(int threads, int64_t quantum, int64_t in_flight, cpu::Policy policy,
                                           int64_t* handle) {
  std::shared_ptr<ServedRun> run(new ServedRun(threads, quantum, in_flight, policy));
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  std::erase_if(all.runs, [](const auto& entry) { return entry.second.expired(); });
  *handle = all.next++;
  all.runs[*handle] = run;
  return run;
}

std::shared_ptr<ServedRun> ServedRun::of(int64_t handle) {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  const auto found = all.runs.find(handle);
  std::shared_ptr<ServedRun> run = found == all.runs.end() ? nullptr : found->second.lock();
  if (!run)
    throw std::invalid_argument("run must be the handle of an open run, and there is none of " +
                                std::to_string(handle));
  return run;
}

ServedRun::ServedRun(int threads, int64_t quantum, int64_t in_flight, cpu::Policy policy)
    : run_({.threads = threads,
            .quantum = quantum,
            .in_flight = in_flight,
            .policy = policy,
            .on_begun =
                [](void* self, int64_t number) {
                  static_cast<ServedRun*>(self)->push({.number = number, .kind = RunEvent::Kind::begun});
                },
            .on_done =
                [](void* self, int64_t number, cpu::Outcome outcome, std::exception_ptr error) {
                  static_cast<ServedRun*>(self)->push(
                      {.number = number, .kind = RunEvent::Kind::done, .outcome = outcome, .error = what(error)});
                },
            .context = this}),
      working_(threads) {
  try {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
  } catch (...) {
    run_.close();
    for (std::thread& thread : threads_) thread.join();
    throw;
  }
}

ServedRun::~ServedRun() {
  run_.close();
  for (std::thread& thread : threads_) thread.join();
}

void ServedRun::work() {
  const DefaultFloatingPoint same_for_all;
  run_.work();
  const std::lock_guard lock(mutex_);
  --working_;
  changed_.notify_all();
}

void ServedRun::join(Guest guest, const cpu::Packed& packed) {
  cpu::Joining joining;
  {
    const std::lock_guard lock(mutex_);
    guest.joining.layout = layout_of(packed);
    const int64_t number = guest.joining.number;
    if (guests_.count(number)) throw std::invalid_argument("number must be new, and its problem still runs");
    Guest& kept = guests_.emplace(number, std::move(guest)).first->second;
    kept.joining.problem.checkpoints = kept.checkpoints.data();
    kept.joining.problem.at = kept.at.data();
    if (kept.steps) {
      kept.joining.on_step_context = this;
      kept.joining.on_step = [](void* self, int64_t number, const cpu::Ended& t) {
        static_cast<ServedRun*>(self)->push(
            {.number = number, .kind = RunEvent::Kind::step, .trajectory = ended_trajectory(t)});
      };
    }
    joining = kept.joining;
  }
  try {
    run_.join(joining);
  } catch (...) {
    const std::lock_guard lock(mutex_);
    guests_.erase(joining.number);
    throw;
  }
}

std::vector<RunEvent> ServedRun::take() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return !events_.empty() || !working_; });
  return std::exchange(events_, {});
}

void ServedRun::push(RunEvent event) {
  const std::lock_guard lock(mutex_);
  if (event.kind == RunEvent::Kind::done) {
    const auto guest = guests_.find(event.number);
    event.memory = std::move(guest->second.memory);
    guests_.erase(guest);
  }
  events_.push_back(std::move(event));
  changed_.notify_all();
}

// Weights of the same sizes, precision and instruction set lay out a workspace alike.
int64_t ServedRun::layout_of(const cpu::Packed& packed) {
  for (size_t i = 0; i < layouts_.size(); ++i)
    if (!std::memcmp(&layouts_[i], &packed, sizeof packed)) return int64_t(i);
  layouts_.push_back(packed);
  return int64_t(layouts_.size()) - 1;
}

}  // namespace eqr
