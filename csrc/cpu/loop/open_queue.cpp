#include "cpu/loop/open_queue.h"

#include <algorithm>

namespace eqr::cpu {
namespace {

int64_t steps(const std::unique_ptr<Running>& running) { return running->flight.trajectory.steps(); }

}  // namespace

Job::Job(const Joining& j) : joining(j), selection(joining.problem) {
  if (is_race(problem())) race.emplace(problem().puzzles);
}

bool Job::stopped() const {
  return stop.load(std::memory_order_relaxed) ||
         std::atomic_ref(problem().control[0]).load(std::memory_order_relaxed) != 0;
}

Running::Running(std::shared_ptr<Job> owner, int64_t number)
    : job(std::move(owner)), flight(job->problem(), job->race ? &*job->race : nullptr) {
  flight.begin(number);
}

// Those that go on side by side do so as far as an eighth of the places goes: others need some, too.
OpenQueue::OpenQueue(Policy policy, int64_t quantum, int64_t in_flight, int64_t threads)
    : policy_(policy), quantum_(quantum), limit_(in_flight), share_(threads + in_flight / 8) {}

int64_t OpenQueue::rank(const Job& job) const {
  if (policy_ == Policy::fifo) return 0;
  return job.service / quantum_ +
         (job.service % quantum_ != 0);  // rounded up: who has had nothing is before all others
}

void OpenQueue::list(Job& job) {
  job.rank = rank(job);
  if (!job.parked.empty()) parked_.insert(turn(job));
  if (job.begun < job.trajectories()) fresh_.insert(turn(job));
}

void OpenQueue::unlist(Job& job) {
  parked_.erase(turn(job));
  fresh_.erase(turn(job));
}

void OpenQueue::add(std::shared_ptr<Job> job) {
  job->place = arrivals_++;
  list(*jobs_.emplace(job->joining.number, std::move(job)).first->second);
}

std::shared_ptr<Job> OpenQueue::find(int64_t number) const {
  const auto found = jobs_.find(number);
  return found == jobs_.end() ? nullptr : found->second;
}

bool OpenQueue::may_begin(const Job& job) const { return in_flight_ < limit_ && job.begun < job.trajectories(); }

Job* OpenQueue::first() const {
  const auto parked = parked_.begin(), fresh = fresh_.begin();
  const bool may = fresh != fresh_.end() && may_begin(*fresh->second);
  if (parked == parked_.end()) return may ? fresh->second : nullptr;
  return may && *fresh < *parked ? fresh->second : parked->second;
}

std::unique_ptr<Running> OpenQueue::take(const Running* current) {
  Job* const job = first();
  if (!job) return nullptr;
  if (current) {
    Job& other = *current->job;
    if (&other != job && turn(other) < turn(*job)) return nullptr;
    if (&other == job) {
      if (!job->abreast()) return nullptr;
      const bool behind = std::any_of(job->parked.begin(), job->parked.end(), [&](const auto& running) {
        return steps(running) < current->flight.trajectory.steps();
      });
      if (!behind && !(may_begin(*job) && job->begun - job->ended < share_)) return nullptr;
    }
  }
  return take_from(*job);
}

std::unique_ptr<Running> OpenQueue::take_from(Job& job) {
  const bool broad = job.abreast() && may_begin(job) && job.begun - job.ended < share_;
  std::unique_ptr<Running> taken;
  unlist(job);
  if (!job.parked.empty() && !broad) {
    const auto least = job.abreast()
                           ? std::min_element(job.parked.begin(), job.parked.end(),
                                              [](const auto& a, const auto& b) { return steps(a) < steps(b); })
                           : job.parked.begin();
    taken = std::move(*least);
    job.parked.erase(least);
  } else {
    try {
      taken = std::make_unique<Running>(jobs_.at(job.joining.number), job.begun);
    } catch (...) {
      drop(job, Outcome::failed, std::current_exception());
      ++failed_;
      return nullptr;
    }
    ++job.begun;
    ++in_flight_;
  }
  ++job.in_hand;
  list(job);
  return taken;
}

void OpenQueue::park(std::unique_ptr<Running> running) {
  Job& job = *running->job;
  --job.in_hand;
  if (job.outcome != Outcome::complete) {
    --in_flight_;
    return;
  }
  unlist(job);
  running->entered = false;
  job.parked.push_back(std::move(running));
  list(job);
}

void OpenQueue::served(Job& job, int64_t steps) {
  unlist(job);
  job.service += steps;
  list(job);
}

void OpenQueue::end(Job& job) {
  --job.in_hand;
  --in_flight_;
  ++job.ended;
}

void OpenQueue::drop(Job& job, Outcome outcome, std::exception_ptr error) {
  unlist(job);
  if (job.outcome == Outcome::complete) job.outcome = outcome, job.error = std::move(error);
  job.stop = true;
  in_flight_ -= int64_t(job.parked.size());
  job.parked.clear();
  job.begun = job.trajectories();
}

std::shared_ptr<Job> OpenQueue::failed() {
  for (; failed_; --failed_)
    for (const auto& [number, job] : jobs_)
      if (job->error && !job->in_hand) return job;
  return nullptr;
}

std::shared_ptr<Job> OpenQueue::leave(Job& job) {
  if (job.outcome == Outcome::complete ? job.ended < job.trajectories() : job.in_hand > 0) return nullptr;
  const auto found = jobs_.find(job.joining.number);
  if (found == jobs_.end() || found->second.get() != &job) return nullptr;
  std::shared_ptr<Job> left = std::move(found->second);
  jobs_.erase(found);
  unlist(job);
  return left;
}

}  // namespace eqr::cpu
