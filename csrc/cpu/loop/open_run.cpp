#include "cpu/loop/open_run.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cpu/loop/backoff.h"
#include "cpu/loop/open_queue.h"
#include "cpu/loop/open_team.h"
#include "cpu/loop/workspace.h"

namespace eqr::cpu {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begun) { return std::chrono::duration<double>(Clock::now() - begun).count(); }

// What a thread computes in.
struct Desk {
  // A workspace for the engine: zero when new, or as the last problem of the same layout left it.
  void* prepare(const Engine& engine, int64_t wanted) {
    if (!workspace || bytes != engine.workspace_bytes || layout != wanted) {
      workspace.reset();
      workspace = std::make_unique<Workspace>(engine.workspace_bytes);
      workspace->clear();
      bytes = engine.workspace_bytes;
      layout = wanted;
    }
    return workspace->data();
  }

  std::unique_ptr<Workspace> workspace;
  int64_t bytes = 0, layout = 0;
  std::shared_ptr<OpenTeam> team;
};

}  // namespace

// A thread runs trajectories of its own while some wait, and otherwise helps one that does. All that they decide is
// under one lock, which is taken once in a quantum.
class OpenRun::State {
 public:
  explicit State(const Options& o) : o_(o), queue_(o.policy, o.quantum, o.in_flight, o.threads) {}

  void join(const Joining& joining) {
    const auto job = std::make_shared<Job>(joining);
    {
      const std::lock_guard lock(mutex_);
      if (closed_) throw std::invalid_argument("the run is closed; nobody joins it any more");
      if (queue_.find(joining.number)) throw std::invalid_argument("number must be new, and its problem still runs");
      queue_.add(job);
      look_up();
      // One without a trajectory has ended.
      if (job->trajectories()) return changed_.notify_all();
      ++leaving_;
      queue_.leave(*job);
    }
    dismiss(*job);
  }

  void cancel(int64_t number) {
    Lock lock(mutex_);
    if (const auto job = queue_.find(number)) {
      queue_.drop(*job, Outcome::cancelled);
      look_up();
      leave(*job, lock);
    }
  }

  void close() {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }

  Counts counts() const {
    const std::lock_guard lock(mutex_);
    return {.in_flight = queue_.in_flight(), .steps = steps_, .busy_seconds = busy_seconds_};
  }

  void work() noexcept {
    Desk desk;
    std::unique_lock lock(mutex_);
    for (;;) {
      if (queue_.waits())
        own(desk, lock);
      else if (!teams_.empty())
        help(lock);
      else if (closed_ && queue_.empty() && !leaving_)
        return;
      else
        changed_.wait(lock);
    }
  }

 private:
  using Lock = std::unique_lock<std::mutex>;

  // Those that compute look at the queue after this outer step.
  void look_up() { news_.fetch_add(1, std::memory_order_relaxed); }

  void own(Desk& desk, Lock& lock) {
    open_team(desk);
    std::unique_ptr<Running> running;
    for (;;) {
      const uint64_t news = news_.load(std::memory_order_relaxed);
      take_turns(desk, &running, lock);
      if (!running) break;
      if (queue_.waits() && desk.team->size() > 1) {  // there is better to do than to help
        close_team(desk);
        open_team(desk);
      }
      Job& job = *running->job;
      lock.unlock();
      const auto begun = Clock::now();
      const int64_t before = running->flight.trajectory.steps();
      const std::exception_ptr error = compute(desk, *running, news);
      const int64_t steps = running->flight.trajectory.steps() - before;
      const double seconds = seconds_since(begun);
      lock.lock();
      steps_ += steps;
      busy_seconds_ += seconds;
      queue_.served(job, steps);
      if (error) {
        queue_.drop(job, Outcome::failed, error);
        queue_.park(std::move(running));
        leave(job, lock);
      } else if (!running->flight.trajectory.going()) {
        const std::shared_ptr<Job> its = running->job;
        running.reset();
        queue_.end(job);
        leave(job, lock);
      }
    }
    close_team(desk);
  }

  // Gives the place of the trajectory in hand, if there is one, to another whose turn it is.
  void take_turns(Desk& desk, std::unique_ptr<Running>* running, Lock& lock) {
    std::unique_ptr<Running> next = queue_.take(running->get());
    while (const std::shared_ptr<Job> failed = queue_.failed()) leave(*failed, lock);
    if (!next) return;
    if (*running) {
      if ((*running)->entered) {
        lock.unlock();
        std::exception_ptr error;
        try {
          (*running)->flight.park(desk.workspace->data());
        } catch (...) {
          error = std::current_exception();
        }
        lock.lock();
        if (error) queue_.drop(*(*running)->job, Outcome::failed, error);
      }
      const std::shared_ptr<Job> job = (*running)->job;
      queue_.park(std::move(*running));
      leave(*job, lock);
    }
    *running = std::move(next);
  }

  // Outer steps of the trajectory in hand, until it has ended or it is time to look at the queue.
  std::exception_ptr compute(Desk& desk, Running& running, uint64_t news) noexcept {
    Job& job = *running.job;
    Flight& flight = running.flight;
    Trajectory& t = flight.trajectory;
    try {
      // They begin in order, so that none waits any more.
      if (t.number() == job.trajectories() - 1 && !std::exchange(running.announced, true))
        o_.on_begun(o_.context, job.joining.number);
      if (job.stopped()) {
        t.cancel();
      } else if (!running.entered) {
        if (flight.hopeless()) {
          t.lose();
        } else {
          flight.enter(*desk.team, desk.prepare(job.problem().engine, job.joining.layout));
          running.entered = true;
        }
      }
      for (int64_t steps = 0; t.going(); ++steps) {
        if (steps && (steps == o_.quantum || is_news(news))) return nullptr;
        if (job.stopped()) {
          t.cancel();
          break;
        }
        flight.step(*desk.team, desk.workspace->data());
        if (job.joining.on_step) {
          t.answer();
          job.joining.on_step(job.joining.on_step_context, job.joining.number, t.ended());
        }
      }
      const Ended ended = flight.end(running.entered ? desk.workspace->data() : nullptr);
      job.selection.offer(ended);
      const FixedPoint& p = job.problem();
      if (p.on_end) p.on_end(p.on_end_context, ended);
      flight.finish();
    } catch (...) {
      return std::current_exception();
    }
    return nullptr;
  }

  bool is_news(uint64_t seen) const { return news_.load(std::memory_order_relaxed) != seen; }

  // If nothing of the problem is left, it is told so.
  void leave(Job& job, Lock& lock) {
    const std::shared_ptr<Job> left = queue_.leave(job);
    if (!left) return;
    ++leaving_;
    lock.unlock();
    dismiss(*left);
    lock.lock();
  }

  void dismiss(Job& job) {
    if (job.outcome == Outcome::complete) try {
        job.selection.finish();
      } catch (...) {
        job.error = std::current_exception();
        job.outcome = Outcome::failed;
      }
    o_.on_done(o_.context, job.joining.number, job.outcome, job.error);
    const std::lock_guard lock(mutex_);
    --leaving_;
    changed_.notify_all();
  }

  void open_team(Desk& desk) {
    desk.team = std::make_shared<OpenTeam>();
    desk.team->open();
    teams_.push_back(desk.team);
    changed_.notify_all();
  }

  void close_team(Desk& desk) {
    desk.team->close();
    std::erase(teams_, desk.team);
  }

  // Works for the smallest team until that is closed.
  void help(Lock& lock) {
    const auto smaller = [](const auto& a, const auto& b) { return a->size() < b->size(); };
    const std::shared_ptr<OpenTeam> team = *std::min_element(teams_.begin(), teams_.end(), smaller);
    OpenTeam::Ticket ticket;
    if (!team->join(team->size(), &ticket)) return;
    lock.unlock();
    double seconds = 0;
    for (Backoff backoff;;) {
      const auto begun = Clock::now();
      const OpenTeam::Turn turn = team->serve(&ticket);
      if (turn == OpenTeam::Turn::closed) break;
      if (turn == OpenTeam::Turn::served) {
        seconds += seconds_since(begun);
        backoff = {};
      } else {
        backoff.pause();
      }
    }
    lock.lock();
    busy_seconds_ += seconds;
  }

  const Options o_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  OpenQueue queue_;
  std::vector<std::shared_ptr<OpenTeam>> teams_;  // that can be helped
  bool closed_ = false;
  int leaving_ = 0;  // problems that have left the queue and are not told yet
  int64_t steps_ = 0;
  double busy_seconds_ = 0;
  std::atomic<uint64_t> news_{0};
};

OpenRun::OpenRun(const Options& options) : state_(std::make_unique<State>(options)) {}
OpenRun::~OpenRun() = default;
void OpenRun::join(const Joining& joining) { state_->join(joining); }
void OpenRun::cancel(int64_t number) { state_->cancel(number); }
void OpenRun::close() { state_->close(); }
OpenRun::Counts OpenRun::counts() const { return state_->counts(); }
void OpenRun::work() noexcept { state_->work(); }

}  // namespace eqr::cpu
