// The barrier, and teams that threads join while they work.
#include <atomic>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/loop/backoff.h"
#include "cpu/loop/open_team.h"

namespace {

using eqr::cpu::Backoff;
using eqr::cpu::Barrier;
using eqr::cpu::Member;
using eqr::cpu::OpenTeam;
using eqr::cpu::Packed;
using eqr::cpu::StepInput;

TEST(barrier_lets_nobody_through_early) {
  constexpr int kRounds = 100;
  for (int size : {1, 2, 3, 4}) {
    Barrier barrier{};
    std::vector<int> round(size, 0);  // plain: the barrier orders the accesses
    const auto member = [&](int rank) {
      for (int r = 1; r <= kRounds; ++r) {
        round[rank] = r;
        barrier.wait(size);
        for (int other : round) CHECK(other == r, size, rank, other, r);
        barrier.wait(size);
      }
    };
    std::vector<std::thread> threads;
    for (int rank = 1; rank < size; ++rank) threads.emplace_back(member, rank);
    member(0);
    for (std::thread& thread : threads) thread.join();
  }
}

TEST(members_divide_all_items) {
  for (int size : {1, 2, 3, 7})
    for (int64_t items : {0, 1, 5, 7, 100}) {
      int64_t next = 0;
      for (int rank = 0; rank < size; ++rank) {
        const Member member{nullptr, rank, size};
        CHECK(member.begin(items) == next, size, items, rank);
        next = member.end(items);
      }
      CHECK(next == items, size, items);
    }
}

// What a call of the team leaves behind: plain data, ordered by the barrier and by the end of the call.
struct Log {
  static constexpr int kTeam = 8;
  int64_t step[kTeam];  // of the last call in which this rank took part
  int64_t calls[kTeam];
  int64_t wrong;
};

void write_log(const Packed*, void* workspace, const StepInput& in, const Member& member) {
  Log& log = *static_cast<Log*>(workspace);
  log.step[member.rank] = in.rng[3];
  ++log.calls[member.rank];
  member.sync();
  if (member.rank == 0)
    for (int r = 0; r < member.size; ++r) log.wrong += log.step[r] != in.rng[3];
}

// Once in, a member takes part in every call to the last, under the rank of its ticket.
TEST(a_team_takes_in_whoever_comes) {
  constexpr int64_t kCalls = 60;
  constexpr int kRepetitions = 20, kOthers = 3;
  int64_t shared = 0;
  for (int repetition = 0; repetition < kRepetitions; ++repetition) {
    OpenTeam team;
    Log log{};
    std::atomic<bool> over{false};
    std::atomic<int> joined{0};
    const auto other = [&](int delay) {
      for (int i = 0; i < delay; ++i) std::this_thread::yield();
      OpenTeam::Ticket ticket;
      while (!team.join(team.size(), &ticket))
        if (over) return;
      ++joined;
      int64_t calls = 0;
      for (Backoff backoff;; backoff.pause()) {
        const OpenTeam::Turn turn = team.serve(&ticket);
        if (turn == OpenTeam::Turn::closed) break;
        calls += turn == OpenTeam::Turn::served;
      }
      CHECK(calls == log.calls[ticket.rank], ticket.rank, calls, log.calls[ticket.rank]);
      CHECK(calls == 0 || log.step[ticket.rank] == kCalls, ticket.rank, log.step[ticket.rank]);
    };
    std::vector<std::thread> threads;
    for (int i = 0; i < kOthers; ++i) threads.emplace_back(other, 7 * i * repetition);
    CHECK(team.size() == 0);
    team.open();
    for (int64_t call = 1; call <= kCalls; ++call) {
      std::this_thread::yield();
      team.call(write_log, nullptr, &log, StepInput{nullptr, {0, 0, 0, call}, 0});
    }
    team.close();
    over = true;
    for (std::thread& thread : threads) thread.join();
    CHECK(team.size() == 0 && log.wrong == 0 && log.calls[0] == kCalls, log.wrong, log.calls[0]);
    for (int rank = 1; rank < Log::kTeam; ++rank) {
      CHECK(log.calls[rank] <= log.calls[rank - 1], rank);
      CHECK(rank <= joined || log.calls[rank] == 0, rank);
      shared += log.calls[rank];
    }
  }
  CHECK(shared > 0);
}

TEST(a_closed_team_turns_away) {
  OpenTeam team;
  OpenTeam::Ticket ticket;
  CHECK(!team.join(0, &ticket));
  team.open();
  CHECK(!team.join(2, &ticket) && team.join(1, &ticket) && ticket.rank == 1 && team.size() == 2);
  CHECK(team.serve(&ticket) == OpenTeam::Turn::none);
  team.close();
  CHECK(team.serve(&ticket) == OpenTeam::Turn::closed);
  CHECK(!team.join(2, &ticket) && !team.join(0, &ticket) && !team.join(1, &ticket));
}

}  // namespace
