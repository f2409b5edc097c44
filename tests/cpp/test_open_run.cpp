// Problems that join a run while it goes on: each as if it were alone, whoever else is there; whose turn it is;
// cancelling, deadlines and errors.
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/loop/open_run.h"
#include "problem.h"

namespace {

using namespace eqr::test;
using eqr::cpu::Ended;
using eqr::cpu::Joining;
using eqr::cpu::OpenRun;
using eqr::cpu::Outcome;
using eqr::cpu::Policy;

// A run with threads of its own, and what it said of its problems.
class Served {
 public:
  explicit Served(int threads, OpenRun::Options options = {}) : run(with(options, threads, this)) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { run.work(); });
  }
  ~Served() { close(); }

  void close() {
    run.close();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

  void join(int64_t number, const Problem& p, Result& result, Joining joining = {}) {
    joining.problem = result.fixed_point(p);
    joining.problem.state_size = kMockState;
    joining.number = number;
    run.join(joining);
  }

  Outcome wait(int64_t number) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return outcomes_.count(number) != 0; });
    return outcomes_.at(number);
  }

  std::vector<int64_t> order() {
    const std::lock_guard lock(mutex_);
    return order_;
  }
  int begun() {
    const std::lock_guard lock(mutex_);
    return begun_;
  }
  std::string error(int64_t number) { return errors_.at(number); }

  OpenRun run;

 private:
  static OpenRun::Options with(OpenRun::Options options, int threads, Served* self) {
    options.threads = threads;
    options.context = self;
    options.on_begun = [](void* context, int64_t number) {
      Served& served = *static_cast<Served*>(context);
      const std::lock_guard lock(served.mutex_);
      CHECK(!served.outcomes_.count(number), number);
      ++served.begun_;
    };
    options.on_done = [](void* context, int64_t number, Outcome outcome, std::exception_ptr error) {
      Served& served = *static_cast<Served*>(context);
      std::string what;
      try {
        if (error) std::rethrow_exception(error);
      } catch (const std::exception& e) {
        what = e.what();
      }
      const std::lock_guard lock(served.mutex_);
      CHECK(served.outcomes_.emplace(number, outcome).second, number);
      served.errors_[number] = what;
      served.order_.push_back(number);
      served.changed_.notify_all();
    };
    return options;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<int64_t, Outcome> outcomes_;
  std::map<int64_t, std::string> errors_;
  std::vector<int64_t> order_;
  int begun_ = 0;
  std::vector<std::thread> threads_;
};

// Problems of all kinds; `variant` tells one from another.
struct Varied : Problem {
  explicit Varied(int variant) : Problem(variant % 5 == 4 ? 3 : 1) {
    constexpr Select kSelects[] = {Select::residual, Select::vote, Select::q, Select::first};
    constexpr Halt kHalts[] = {Halt::residual, Halt::q, Halt::residual_or_q};
    seed = variant;
    breadth = 1 + variant % 4;
    depth = 8 + 13 * (variant % 7);
    select = kSelects[variant / 2 % 4];
    halt = kHalts[variant % 3];
    tol = 0.01f * float(1 + variant % 3);
    window = 1 + variant % 5;
    patience = 1 + variant % 2;
    if (variant % 6 == 5) checkpoints = {1, 3, 8};
  }
};

// Every trajectory of one puzzle to the same depth.
struct Deep : Problem {
  Deep(int64_t trajectories, int64_t steps, int sleep_us) : Problem(1) {
    breadth = trajectories, depth = steps, halt = Halt::none;
    mock.fixed_sleep_us = sleep_us;
  }
};

// Of a race, the losers' steps depend on the company.
bool same_answers(const Problem& p, const Result& got, const Result& alone) {
  if (p.select != Select::first) return same(got, alone);
  return got.winner == alone.winner && got.logits == alone.logits;
}

TEST(who_joins_gets_what_he_gets_alone_in_any_company_and_order) {
  constexpr int kProblems = 120;
  std::deque<Varied> problems;
  std::deque<Result> alone;
  for (int i = 0; i < kProblems; ++i) alone.push_back(solve(problems.emplace_back(i), 1));
  std::minstd_rand random(5);
  for (int round = 0; round < 12; ++round) {
    OpenRun::Options options;
    options.quantum = round % 4 == 3 ? OpenRun::kWhole : 1 + round % 4 * 2;
    options.in_flight = round % 3 ? 5 + 20 * (round % 2) : OpenRun::kWhole;
    options.policy = round % 5 == 4 ? Policy::fifo : Policy::least_service;
    std::deque<Result> results;
    for (const Varied& p : problems) results.emplace_back(p);
    std::vector<int> order(kProblems);
    for (int i = 0; i < kProblems; ++i) order[size_t(i)] = i;
    std::shuffle(order.begin(), order.end(), random);
    Served served(1 + round % 4, options);
    const auto join_some = [&](int first) {
      for (int i = first; i < kProblems; i += 2) {
        if (i % 16 == 0) usleep(200);
        const int n = order[size_t(i)];
        served.join(n, problems[size_t(n)], results[size_t(n)]);
      }
    };
    std::thread other(join_some, 1);
    join_some(0);
    other.join();
    served.close();  // those that are there come to their ends
    for (int n = 0; n < kProblems; ++n) {
      CHECK(served.wait(n) == Outcome::complete, n, served.error(n));
      CHECK(same_answers(problems[size_t(n)], results[size_t(n)], alone[size_t(n)]), round, n);
      CHECK(problems[size_t(n)].mock.mistakes == 0, n);
    }
    const OpenRun::Counts counts = served.run.counts();
    int64_t steps = 0;
    for (const Result& result : results) steps += result.control[2];
    CHECK(counts.in_flight == 0 && counts.steps == steps && counts.busy_seconds > 0, counts.in_flight, counts.steps);
    CHECK(served.begun() == kProblems, served.begun());
  }
}

TEST(the_least_served_goes_first_and_the_first_come_in_a_queue) {
  for (Policy policy : {Policy::least_service, Policy::fifo}) {
    const Deep deep(6, 300, 20), shallow(1, 8, 0);
    Result deep_result(deep);
    std::deque<Result> shallow_results;
    Served served(1, {.quantum = 4, .policy = policy});
    served.join(0, deep, deep_result);
    for (int n = 1; n <= 20; ++n) served.join(n, shallow, shallow_results.emplace_back(shallow));
    served.close();
    const std::vector<int64_t> order = served.order();
    const int64_t place = std::find(order.begin(), order.end(), 0) - order.begin();
    CHECK(place == (policy == Policy::fifo ? 0 : 20), place);
  }
}

TEST(whoever_joins_is_served_at_the_next_outer_step) {
  for (int threads : {1, 2, 3}) {
    const Deep deep(4, 400, 500), shallow(1, 2, 500);
    Result deep_result(deep), shallow_result(shallow);
    Served served(threads, {.quantum = 1000});
    served.join(0, deep, deep_result);
    while (__atomic_load_n(&deep_result.control[2], __ATOMIC_RELAXED) < 5) usleep(100);
    served.join(1, shallow, shallow_result);
    CHECK(served.wait(1) == Outcome::complete);
    // Long before any of the others has had its quantum.
    CHECK(__atomic_load_n(&deep_result.control[1], __ATOMIC_RELAXED) == 0, threads);
    served.run.cancel(0);
    CHECK(served.wait(0) == Outcome::cancelled);
  }
}

TEST(a_lone_problem_has_all_threads_until_another_joins) {
  const Deep p(1, 400, 300), q(1, 400, 300), quiet(1, 400, 0);
  Result p_result(p), q_result(q);
  Served served(3, {.quantum = 4});
  served.join(0, p, p_result);
  while (p.mock.largest_team < 3 && __atomic_load_n(&p_result.control[1], __ATOMIC_RELAXED) == 0) usleep(100);
  CHECK(p.mock.largest_team == 3, p.mock.largest_team);
  served.join(1, q, q_result);
  CHECK(served.wait(0) == Outcome::complete && served.wait(1) == Outcome::complete);
  CHECK(p.mock.mistakes == 0 && q.mock.mistakes == 0);
  CHECK(same(p_result, solve(quiet, 1)) && same(q_result, p_result));
}

TEST(cancelled_problems_leave_at_once_and_harm_nobody) {
  for (int threads : {1, 2}) {
    const Deep deep(40, 2000, 200), quiet(40, 2000, 0);
    const Varied other(0);
    Result cancelled(deep), waiting(deep), polled(deep), kept(other);
    Served served(threads, {.quantum = 2, .in_flight = 3});
    served.join(0, deep, cancelled);
    served.join(1, deep, waiting);
    served.join(2, deep, polled);
    served.join(3, other, kept);
    usleep(10000);
    served.run.cancel(0);
    served.run.cancel(1);
    served.run.cancel(12345);  // nobody
    __atomic_store_n(&polled.control[0], 1, __ATOMIC_RELAXED);
    CHECK(served.wait(0) == Outcome::cancelled && served.wait(1) == Outcome::cancelled);
    CHECK(served.wait(2) == Outcome::complete);  // by its own control, which it can read
    CHECK(served.wait(3) == Outcome::complete && same(kept, solve(other, 1)));
    const Oracle oracle(quiet);
    for (int64_t t = 0; t < deep.breadth; ++t) {
      CHECK(polled.end.status[size_t(t)] == eqr::kCancelled, t);
      Table want(deep.trajectories(), deep.mock.tokens);
      const int64_t steps = polled.end.steps[size_t(t)];
      if (steps) oracle.record(t, steps, &want);
      const int64_t at = t * deep.mock.tokens;
      for (int64_t s = at; s < at + deep.mock.tokens; ++s)
        CHECK(polled.end.preds[size_t(s)] == (steps ? want.preds[size_t(s)] : 0), t, steps);
    }
    CHECK(served.run.counts().in_flight == 0, served.run.counts().in_flight);
  }
}

void throws_at_third(void*, int64_t, const Ended& t) {
  if (t.steps == 3) throw std::runtime_error("thrown by on_step");
}

TEST(a_problem_has_begun_when_none_of_it_waits) {
  const Deep broad(20, 1000000, 50), other(1, 2, 0);
  Result result(broad), other_result(other);
  Served served(2, {.quantum = 4, .in_flight = 5});
  served.join(0, broad, result);
  while (__atomic_load_n(&result.control[2], __ATOMIC_RELAXED) < 20) usleep(100);
  CHECK(served.begun() == 0);
  served.run.cancel(0);
  CHECK(served.wait(0) == Outcome::cancelled);
  served.join(1, other, other_result);
  CHECK(served.wait(1) == Outcome::complete && served.begun() == 1, served.begun());
}

TEST(a_problem_that_fails_takes_nobody_with_it) {
  for (int threads : {1, 3}) {
    std::deque<Varied> problems;
    std::deque<Result> results;
    Served served(threads, {.quantum = 2, .in_flight = 4});
    for (int n = 0; n < 30; ++n) {
      results.emplace_back(problems.emplace_back(n));
      Joining joining;
      if (n % 3 == 0) joining.on_step = throws_at_third;
      served.join(n, problems.back(), results.back(), joining);
    }
    for (int n = 0; n < 30; ++n) {
      const Varied& p = problems[size_t(n)];
      if (n % 3) {
        CHECK(served.wait(n) == Outcome::complete && same_answers(p, results[size_t(n)], solve(p, 1)), n);
      } else {
        CHECK(served.wait(n) == Outcome::failed && served.error(n) == "thrown by on_step", n, served.error(n));
      }
    }
    served.close();
    const OpenRun::Counts counts = served.run.counts();
    CHECK(counts.in_flight == 0, counts.in_flight);
  }
}

TEST(a_problem_that_has_no_memory_fails_alone) {
  const Varied p(4), other(0);
  Result failing(p), kept(other);
  Served served(2, {.quantum = 2});
  Joining joining{.problem = failing.fixed_point(p), .number = 1};
  joining.problem.engine.workspace_bytes = int64_t{1} << 60;
  served.run.join(joining);
  served.join(2, other, kept);
  CHECK(served.wait(1) == Outcome::failed && served.error(1) == std::bad_alloc().what(), served.error(1));
  CHECK(served.wait(2) == Outcome::complete && same(kept, solve(other, 1)));
}

std::vector<int64_t> seen;  // restart * 1000 + step, in order

TEST(every_outer_step_is_told_and_those_who_are_looked_at_go_on_side_by_side) {
  const Varied p(1);
  Result result(p);
  seen.clear();
  Joining joining;
  joining.on_step = [](void*, int64_t number, const Ended& t) {
    CHECK(number == 7 && t.puzzle == 0 && t.preds && t.logits, number);
    seen.push_back(t.restart * 1000 + t.steps);
  };
  Served served(1, {.quantum = 3});
  served.join(7, p, result, joining);
  CHECK(served.wait(7) == Outcome::complete);
  std::vector<int64_t> ahead(size_t(p.breadth), 0), want;
  for (int64_t entry : seen) {
    // Nobody is more than a turn ahead of one that goes on.
    const int64_t restart = entry / 1000;
    ahead[size_t(restart)] = entry % 1000;
    for (int64_t t = 0; t < p.breadth; ++t)
      if (ahead[size_t(t)] < result.end.steps[size_t(t)]) CHECK(entry % 1000 - ahead[size_t(t)] <= 3, entry, t);
  }
  for (int64_t t = 0; t < p.breadth; ++t)
    for (int64_t k = 1; k <= result.end.steps[size_t(t)]; ++k) want.push_back(t * 1000 + k);
  std::sort(seen.begin(), seen.end());
  CHECK(seen == want, seen.size(), want.size());
}

TEST(a_run_with_nothing_to_do_costs_nothing_and_takes_nobody_once_closed) {
  Served served(3);
  const Varied p(0);
  const Problem none(0);
  Result result(p), empty(none);
  served.join(0, p, result);
  CHECK(served.wait(0) == Outcome::complete);
  served.join(1, none, empty);
  CHECK(served.wait(1) == Outcome::complete);
  rusage before, after;
  getrusage(RUSAGE_SELF, &before);
  usleep(100000);
  getrusage(RUSAGE_SELF, &after);
  const auto micros = [](const rusage& r) { return r.ru_utime.tv_sec * 1000000 + r.ru_utime.tv_usec; };
  CHECK(micros(after) - micros(before) < 20000, micros(after) - micros(before));
  served.close();
  std::string error;
  try {
    served.join(2, p, result);
  } catch (const std::exception& e) {
    error = e.what();
  }
  CHECK(error.find("closed") != std::string::npos, error);
}

}  // namespace
