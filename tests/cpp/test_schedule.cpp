// Threads, teams, races, cancelling, errors and memory of the fixed-point loop.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "allocations.h"
#include "check.h"
#include "cpu/loop/selection.h"
#include "problem.h"

namespace {

using namespace eqr::test;
using eqr::cpu::FixedPointRun;

constexpr int64_t kCancelled = eqr::kCancelled;

int64_t load(const int64_t& shared) { return __atomic_load_n(&shared, __ATOMIC_RELAXED); }

TEST(one_trajectory_is_split_over_all_threads) {
  Problem p(1);
  p.breadth = 1;
  p.depth = 800;  // nearly half a second: however busy the machine, the other threads come before the end
  p.halt = Halt::none;
  const Result alone = solve(p, 1);
  CHECK(p.mock.shared_steps == 0);
  p.mock.fixed_sleep_us = 500;
  for (int threads : {2, 3, 4}) {
    p.mock.shared_steps = p.mock.largest_team = 0;
    CHECK(same(solve(p, threads), alone), threads);
    CHECK(p.mock.shared_steps > 0, threads);
    CHECK(p.mock.largest_team == threads, threads, p.mock.largest_team);
  }
  CHECK(p.mock.mistakes == 0);
}

TEST(the_tail_of_a_batch_is_shared) {
  Problem p(3);
  p.breadth = 1;
  p.depth = 500;  // as above
  p.halt = Halt::none;
  const Result alone = solve(p, 1);
  p.mock.fixed_sleep_us = 500;
  p.mock.workspaces = 0;
  CHECK(same(solve(p, 2), alone));
  // Two begin alone, side by side; whoever has nothing left shares the rest.
  CHECK(p.mock.shared_steps > 0 && p.mock.shared_steps < 1500, p.mock.shared_steps);
  CHECK(p.mock.workspaces == 2, p.mock.workspaces);
}

TEST(more_threads_than_slots_work_in_teams) {
  Problem p(6);
  p.depth = 100;
  p.halt = Halt::none;
  p.slots = 2;
  p.mock.fixed_sleep_us = 300;
  const Result result = solve(p, 4);
  CHECK(same(solve(p, 1), result));
  CHECK(p.mock.shared_steps > 0 && p.mock.largest_team >= 2, p.mock.shared_steps, p.mock.largest_team);
}

TEST(fewer_threads_may_come_and_one_after_another) {
  Problem p(3);
  const Result expected = solve(p, 1);
  Result one(p), in_turn(p);
  FixedPointRun first(one.fixed_point(p), 8), second(in_turn.fixed_point(p), 3);
  first.work(nullptr);
  first.finish();
  for (int i = 0; i < 3; ++i) second.work(nullptr);
  second.finish();
  CHECK(same(one, expected) && same(in_turn, expected));
}

TEST(runs_at_the_same_time_do_not_meet) {
  Problem a(3), b(4);
  b.seed = 8;
  b.noise_scale = 0.002f;
  const Result alone_a = solve(a, 1), alone_b = solve(b, 1);
  a.mock.sleep_us = b.mock.sleep_us = 200;
  std::thread other([&] { CHECK(same(solve(b, 2), alone_b)); });
  CHECK(same(solve(a, 2), alone_a));
  other.join();
}

// The trajectory has its full result, or was stopped when it could not win any more.
void check_racer(const Problem& p, const Oracle& oracle, const Result& got, const Table& end, int64_t t) {
  const int64_t s = got.end.steps[t], first = t / p.breadth * p.breadth;
  if (got.end.status[t] != kCancelled) {
    CHECK(s == end.steps[t] && got.end.status[t] == end.status[t] && close(got.end.score[t], end.score[t]), t, s);
    return;
  }
  bool hopeless = false;
  for (int64_t u = first; u < first + p.breadth; ++u)
    hopeless |= eqr::settled(Status(end.status[u])) && (end.steps[u] < s + 1 || (end.steps[u] == s + 1 && u < t));
  CHECK(hopeless && s < end.steps[t], t, s, end.steps[t]);
  Table want(p.trajectories(), p.mock.tokens);
  if (s) oracle.record(t, s, &want);
  for (int64_t i = t * p.mock.tokens; i < (t + 1) * p.mock.tokens; ++i)
    CHECK(got.end.preds[i] == (s ? want.preds[i] : 0), t, i);
  CHECK(s ? got.end.residual[t] == want.residual[t] : std::isnan(got.end.residual[t]), t, s);
  CHECK(s ? close(got.end.score[t], want.score[t]) : std::isnan(got.end.score[t]), t, s);
  CHECK(s ? got.end.q_halt[t] == want.q_halt[t] : std::isnan(got.end.q_halt[t]), t, s);
}

// As the caller reads it: who was still going, or was stopped just there, had spent the whole depth.
Table at_depth(Table table, int64_t depth) {
  for (size_t t = 0; t < table.status.size(); ++t) {
    const bool here = table.status[t] == kCancelled && table.steps[t] == depth;
    if (here || table.status[t] == eqr::kGoing) table.status[t] = eqr::kMaxDepth;
  }
  return table;
}

TEST(a_race_has_the_same_winner_for_any_timing) {
  constexpr Halt kHalts[] = {Halt::residual, Halt::q, Halt::residual_and_q, Halt::residual_or_q};
  for (int variant = 0; variant < 4; ++variant) {
    Problem p(6);
    p.breadth = 5;
    p.depth = 40;
    p.select = Select::first;
    p.halt = kHalts[variant];
    p.checkpoints = {1, 2, 3, 4, 5, 6, 8, 10, 20, 40};
    const Oracle oracle(p);
    const Table end = oracle.table(p.depth);
    const std::vector<int64_t> winners = oracle.winners(end);
    const int64_t size = p.mock.tokens * p.mock.vocabulary;
    int64_t full = 0, cancelled = 0, least = 1 << 30;
    for (int64_t steps : end.steps) full += steps;
    constexpr int64_t kSlots[] = {1, 2, 3, 100};
    for (int round = 0; round < 16; ++round) {
      p.slots = kSlots[round % 4];
      p.mock.sleep_us = round % 3 * 60;
      const Result got = solve(p, 1 + round % 4);
      CHECK(got.winner == winners, variant, round);
      for (int64_t t = 0; t < p.trajectories(); ++t) {
        check_racer(p, oracle, got, end, t);
        cancelled += got.end.status[t] == kCancelled;
      }
      for (int64_t n = 0; n < p.puzzles(); ++n) {
        const int64_t t = n * p.breadth + winners[n];
        CHECK(got.end.steps[t] == end.steps[t] && got.end.status[t] == end.status[t], round, n);
        const std::vector<float> want = oracle.logits(t, end.steps[t]);
        CHECK(std::equal(want.begin(), want.end(), got.logits.begin() + n * size), round, n);
      }
      for (size_t c = 0; c < p.checkpoints.size(); ++c) {
        const Table shallow = at_depth(oracle.table(p.checkpoints[c]), p.checkpoints[c]);
        const Table at = at_depth(got.at[c], p.checkpoints[c]);
        CHECK(oracle.winners(at) == oracle.winners(shallow), round, p.checkpoints[c]);
      }
      CHECK(got.control[1] == p.trajectories(), got.control[1]);
      least = std::min(least, got.control[2]);
    }
    CHECK(cancelled > 0 && least < full, variant, cancelled, least, full);
  }
}

void check_row(const Problem& p, const Table& got, const Table& want, int64_t t) {
  const int64_t S = p.mock.tokens;
  CHECK(std::equal(&want.preds[t * S], &want.preds[t * S] + S, &got.preds[t * S]), t);
  CHECK(got.steps[t] == want.steps[t] && got.status[t] == want.status[t], t, got.steps[t], got.status[t]);
  CHECK(close(got.q_halt[t], want.q_halt[t]), t, got.q_halt[t], want.q_halt[t]);
  CHECK(close(got.residual[t], want.residual[t]), t, got.residual[t], want.residual[t]);
  CHECK(close(got.score[t], want.score[t]), t, got.score[t], want.score[t]);
}

// Rows keep what they had; those that never ran have nothing.
int64_t check_cancelled(const Problem& p, const Oracle& oracle, const Result& got) {
  int64_t cancelled = 0;
  const int64_t S = p.mock.tokens, size = S * p.mock.vocabulary;
  const Table end = oracle.table(p.depth);
  for (int64_t t = 0; t < p.trajectories(); ++t) {
    const int64_t s = got.end.steps[t];
    Table want = end;
    if (got.end.status[t] == kCancelled) {
      ++cancelled;
      if (s) oracle.record(t, s, &want);
      if (!s) want.q_halt[t] = want.score[t] = NAN;
      if (!s) std::fill_n(want.preds.begin() + t * S, S, 0);
      want.residual[t] = NAN;
      want.status[t] = kCancelled;
      want.steps[t] = s;
      CHECK(s < end.steps[t], t, s);
    }
    check_row(p, got.end, want, t);
    for (size_t c = 0; c < p.checkpoints.size(); ++c) {
      const int64_t depth = p.checkpoints[c];
      Table at = want;
      if (depth <= s) oracle.record(t, depth, &at);
      check_row(p, got.at[c], at, t);
    }
  }
  CHECK(got.winner == oracle.winners(got.end));
  for (int64_t n = 0; n < p.puzzles(); ++n) {
    const int64_t t = n * p.breadth + got.winner[n];
    const std::vector<float> want = oracle.logits(t, got.end.steps[t]);
    CHECK(std::equal(want.begin(), want.end(), got.logits.begin() + n * size), n);
  }
  CHECK(got.control[1] == p.trajectories(), got.control[1]);
  return cancelled;
}

TEST(cancelled_before_it_began) {
  for (Select select : {Select::residual, Select::vote, Select::q}) {
    Problem p(3);
    p.select = select;
    p.checkpoints = {1, 5};
    Result result(p);
    result.control[0] = 1;
    solve_into(result, p, 2, nullptr);
    CHECK(check_cancelled(p, Oracle(p), result) == p.trajectories());
    CHECK(result.control[2] == 0 && result.winner == std::vector<int64_t>(3, 0));
    for (float x : result.logits) CHECK(x == 0);
  }
}

TEST(cancelled_by_another_thread_within_an_outer_step) {
  for (int threads : {1, 2, 4}) {
    Problem p(5);
    p.halt = Halt::none;
    p.depth = 20;
    p.slots = 3;
    p.checkpoints = {1, 2, 4, 9, 20};
    p.mock.fixed_sleep_us = 1000;
    const Oracle oracle(p);
    Result result(p);
    int64_t spent = 0, finished = 0;
    std::thread canceller([&] {
      while (load(result.control[2]) < 75) usleep(100);
      __atomic_store_n(&result.control[0], 1, __ATOMIC_RELAXED);
      spent = load(result.control[2]);
      finished = load(result.control[1]);
    });
    solve_into(result, p, threads, nullptr);
    canceller.join();
    const int64_t cancelled = check_cancelled(p, oracle, result);
    CHECK(cancelled > 0 && cancelled < p.trajectories() && finished > 0, threads, cancelled, finished);
    CHECK(result.control[2] - spent <= std::min(threads, 3), threads, spent, result.control[2]);
  }
}

using Clock = std::chrono::steady_clock;
std::atomic<int64_t> polls{0};
std::atomic<Clock::rep> last_poll{0}, shortest{0};

bool counting_poll() {
  const Clock::rep now = Clock::now().time_since_epoch().count(), last = last_poll.exchange(now);
  if (last) shortest = std::min(shortest.load(), now - last);
  ++polls;
  return true;
}
bool third_poll_refuses() { return ++polls < 3; }
bool throwing_poll() { throw std::runtime_error("thrown by poll"); }

// Every pair of threads of which one polls: it may own a trajectory, work for another, or have nothing to do.
Result run_with_poll(const Problem& p, bool (*poll)(), bool poller_first) {
  polls = 0;
  last_poll = 0;
  shortest = Clock::duration(std::chrono::hours(1)).count();
  Result result(p);
  FixedPointRun run(result.fixed_point(p), 2);
  std::thread first([&] { run.work(poller_first ? poll : nullptr); });
  usleep(15000);
  run.work(poller_first ? nullptr : poll);
  first.join();
  run.finish();
  return result;
}

TEST(poll_is_called_every_20_ms_by_working_and_waiting_threads) {
  for (bool poller_first : {true, false}) {
    Problem p(1);
    p.breadth = 1;
    p.depth = 40;
    p.halt = Halt::none;
    p.mock.fixed_sleep_us = 5000;
    const auto begin = Clock::now();
    run_with_poll(p, counting_poll, poller_first);
    const double ms = std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
    CHECK(polls >= 3 && polls <= ms / 20 + 1, poller_first, polls, ms);
    CHECK(shortest >= std::chrono::nanoseconds(std::chrono::milliseconds(20)).count(), shortest);
  }
}

TEST(poll_cancels) {
  for (bool poller_first : {true, false})
    for (int64_t breadth : {1, 3}) {
      Problem p(2);
      p.breadth = breadth;
      p.depth = 200;
      p.halt = Halt::none;
      p.mock.fixed_sleep_us = 4000;
      const Oracle oracle(p);
      const Result result = run_with_poll(p, third_poll_refuses, poller_first);
      CHECK(check_cancelled(p, oracle, result) == p.trajectories() && polls == 3, poller_first, polls);
      CHECK(result.control[2] > 0);
    }
}

std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

TEST(what_poll_throws_comes_out_of_finish) {
  for (bool poller_first : {true, false})
    for (int64_t breadth : {1, 4}) {
      Problem p(1);
      p.breadth = breadth;
      p.depth = 200;
      p.halt = Halt::none;
      p.mock.fixed_sleep_us = 2000;
      const std::string error = error_of([&] { run_with_poll(p, throwing_poll, poller_first); });
      CHECK(error == "thrown by poll", poller_first, breadth, error);
    }
}

TEST(running_out_of_memory_comes_out_of_finish) {
  Problem p(8);
  p.select = Select::vote;
  for (int threads : {1, 2, 3})
    for (int64_t slots : {1, 3})
      for (int64_t after : {0, 1, 2, 5, 9}) {
        p.slots = slots;
        Result result(p);
        FixedPointRun run(result.fixed_point(p), threads);
        const auto work = [&] {
          fail_allocations_after(after);
          run.work(nullptr);
          fail_allocations_after(-1);
        };
        std::vector<std::thread> pool;
        for (int i = 1; i < threads; ++i) pool.emplace_back(work);
        work();
        for (std::thread& thread : pool) thread.join();
        CHECK(error_of([&] { run.finish(); }) == std::bad_alloc().what(), threads, slots, after);
      }
  // And in the constructor, at once.
  Result result(p);
  fail_allocations_after(1);
  const std::string error = error_of([&] { FixedPointRun(result.fixed_point(p), 2); });
  fail_allocations_after(-1);
  CHECK(error == std::bad_alloc().what(), error);
}

struct Memory {
  int64_t held, grown, made;  // bytes asked for by the constructor, kept by the work, allocations by the work
};

Memory memory_of(const Problem& p) {
  Result result(p);
  const auto fixed_point = result.fixed_point(p);
  const int64_t before = allocated_bytes();
  FixedPointRun run(fixed_point, 4);
  const int64_t held = allocated_bytes() - before, live = live_bytes(), made = allocations();
  run.work(nullptr);
  return {held, live_bytes() - live, allocations() - made};
}

TEST(memory_grows_neither_with_depth_nor_with_breadth) {
  for (Select select : {Select::residual, Select::first, Select::vote}) {
    const auto measured = [&](int64_t depth, int64_t breadth, int64_t slots) {
      Problem p(2);
      p.depth = depth, p.breadth = breadth, p.slots = slots, p.select = select;
      p.halt = Halt::q;
      p.mock.answers = 1;
      p.noise_scale = 0;
      return memory_of(p);
    };
    const Memory base = measured(16, 8, 2), deep = measured(1024, 8, 2), broad = measured(16, 100, 2);
    CHECK(deep.held == base.held && broad.held == base.held, base.held, deep.held, broad.held);
    if (select != Select::vote) {
      CHECK(base.grown == 0 && base.made == 0 && deep.made == 0 && broad.made == 0, base.made, deep.made, broad.made);
    } else {
      CHECK(base.grown > 0 && base.grown < 20000, base.grown);
    }
    Problem p(2);
    Result result(p);
    const int64_t each = FixedPointRun::bytes_per_trajectory(result.fixed_point(p));
    const int64_t grown = measured(16, 8, 3).held - base.held;
    CHECK(grown >= each && grown <= each + 256, grown, each);
  }
}

}  // namespace
