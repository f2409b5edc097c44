// A phase's items go to one member each, whoever is slow, and phases follow one another without a sync.
#define EQR_ISA share_test
#define EQR_ISA_IS_portable
#include "cpu/kernels/share.h"

#include <atomic>
#include <deque>
#include <thread>
#include <vector>

#include "check.h"

using eqr::cpu::Barrier;
using eqr::cpu::Member;
using eqr::cpu::share_test::Share;

namespace {

constexpr int64_t kItems = 37;

struct Team {
  Barrier barrier{};
  uint32_t phase = 0;
  uint32_t claims[kItems] = {};
  std::deque<std::atomic<int>> done;  // [phases * kItems]

  // `calls` calls of `phases` phases each; member `slow` takes its time over every item.
  void work(int rank, int size, int calls, int phases, int slow) {
    for (int call = 0; call < calls; ++call) {
      const Member m{&barrier, rank, size};
      Share share(m, &phase, claims);
      for (int p = 0; p < phases; ++p) {
        const int64_t items = p % 2 ? kItems : 5;
        share.each(items, [&](int64_t item) {
          ++done[size_t((call * phases + p) * kItems + item)];
          if (rank == slow)
            for (int i = 0; i < 20; ++i) std::this_thread::yield();
        });
      }
      m.sync();
      share.end();
      m.sync();
    }
  }

  void run(int size, int calls, int phases, int slow) {
    done = std::deque<std::atomic<int>>(size_t(calls * phases * kItems));
    std::vector<std::thread> threads;
    for (int rank = 1; rank < size; ++rank) threads.emplace_back([=, this] { work(rank, size, calls, phases, slow); });
    work(0, size, calls, phases, slow);
    for (std::thread& thread : threads) thread.join();
  }
};

bool each_once(const Team& team, int calls, int phases) {
  for (int p = 0; p < calls * phases; ++p)
    for (int64_t i = 0; i < kItems; ++i)
      if (team.done[size_t(p * kItems + i)] != (i < (p % phases % 2 ? kItems : 5))) return false;
  return true;
}

}  // namespace

TEST(every_item_of_every_phase_is_done_once) {
  for (int size : {1, 2, 3, 8})
    for (int slow : {-1, 0, 1}) {
      Team team;
      team.run(size, 6, 5, slow);
      CHECK(each_once(team, 6, 5));
    }
}

TEST(phases_are_told_apart_beyond_the_largest_number) {
  Team team;
  team.phase = 0xFFFFFFF0u;
  for (uint32_t& claim : team.claims) claim = 0xFFFFFFF0u;
  team.run(3, 8, 6, 1);
  CHECK(each_once(team, 8, 6));
}

TEST(members_beyond_the_limit_take_nothing) {
  Barrier barrier{};
  uint32_t phase = 0, claims[4] = {};
  const Member last{&barrier, 2, 3};
  Share share(last, &phase, claims);
  share.each(4, [](int64_t) { CHECK(false); }, 2);
}
