// Races in shared memory: two accesses, one a store, with no barrier between them that orders them. They are found
// whatever the schedule, in programs whose bodies are compiled with -fsanitize=thread: EQR_RACES in CMakeLists.txt. The
// calls that this puts at every load and store end in races.cpp, and no runtime of the sanitizer is linked.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "emulator.h"

namespace eqr::emu {

struct Cta;
struct Thread;
struct Warp;
struct Mbarrier;

namespace races {

constexpr bool kOn = kFindsRaces;

// By numbers of threads in their cluster: the tick of each that happened before. Behind the threads there is a number
// for the bulk copies into each CTA.
using Clock = std::vector<uint32_t>;

// A thread's view: of the others by `before`, of itself by `tick`, which counts what it has told others.
struct View {
  int number = 0;
  uint32_t tick = 1, fenced = 0;  // up to which tick its stores are fenced for the asynchronous readers
  std::shared_ptr<const Clock> before;
};

struct Access {
  uint32_t tick = 0;  // 0: none
  uint16_t number = 0;
};
struct Cell {  // two bytes of shared memory: two threads that store one each are a race
  Access store, loads[3];
};

enum class How { kLoad, kStore, kLoadAsync };

void start(Cta& cta);
// `bytes` at `offset` in the shared memory of `cta`. Does not return if that is a race.
void access(Thread& by, Cta& cta, uint32_t offset, int bytes, How how, const void* code = nullptr, bool note = true);
// A copy into `cta`; the tick that its arrival tells.
uint32_t bulk_store(Thread& by, Cta& cta, uint32_t offset, int bytes);

void meet(const std::vector<std::pair<Warp*, uint32_t>>& lanes);  // all of them have waited for all
void arrive(Thread& thread, Mbarrier& barrier);
void arrive(const Cta& cta, uint32_t tick, Mbarrier& barrier);  // a bulk copy
void complete(Mbarrier& barrier);
void pass(Thread& thread, const Mbarrier& barrier);
void fence(Thread& thread);

}  // namespace races
}  // namespace eqr::emu
