// Threads wait and go on: which of those that can does, and what happens when none can.
#include <algorithm>
#include <utility>

#include "machine.h"

namespace eqr::emu {
namespace {

constexpr int kIdleRounds = 1000;
constexpr uint64_t kLooks = 10'000'000;

}  // namespace

uint64_t Random::next() {  // splitmix64
  uint64_t x = state += 0x9E3779B97F4A7C15;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return x ^ x >> 31;
}

void Machine::meet(const Operation& operation, void* argument, void (*complete)(Warp&)) {
  Thread& self = *current;
  Warp& warp = *self.warp;
  if (warp.arrived && warp.at != operation) {
    int other = 0;
    while (!(warp.arrived >> other & 1)) ++other;
    fail("comes to " + operation.text() + " while lane " + std::to_string(other) + " of its warp is at " +
         warp.at.text());
  }
  if (warp.ended && !operation.kind->without_ended)
    fail("comes to " + operation.text() + ", which takes all lanes of the warp, and some have ended");
  warp.at = operation;
  warp.complete = complete;
  warp.arguments[self.lane()] = argument;
  warp.arrived |= 1u << self.lane();
  self.at = operation;
  self.state = Thread::kWaiting;
  if ((warp.arrived | warp.ended) == kAllLanes) {
    warp.met = std::exchange(warp.arrived, 0);
    complete(warp);
  }
  if (self.state == Thread::kWaiting) switch_out();
}

void Machine::wait(const Operation& operation) {
  current->at = operation;
  current->state = Thread::kWaiting;
  switch_out();
}

void Machine::pause() {
  current->state = Thread::kPaused;
  paused_.push_back(current);
  switch_out();
}

void Machine::maybe_switch() {
  if (random.below(4)) return;
  Thread* self = std::exchange(current, nullptr);
  wake(*self);
  current = self;
  switch_out();
}

void Machine::look() {
  if (std::exchange(progress_looked_, progress) != progress) looks_ = 0;
  if (++looks_ > kLooks) throw Error("deadlock: threads only look at memory, again and again\n" + table());
  maybe_switch();
}

void Machine::stop(const std::string& error) {
  error_ = std::make_exception_ptr(Error(error));
  current->state = Thread::kEnded;
  current->fiber.leave();
  __builtin_trap();
}

void Machine::switch_out() {
  Thread& self = *current;
  self.fiber.leave();
}

void Machine::wake(Thread& thread) {
  if (&thread == current) {
    thread.state = Thread::kRunning;
    return;
  }
  thread.state = Thread::kReady;
  Warp& warp = *thread.warp;
  if (!warp.ready) {
    warp.place = ready_.size();
    ready_.push_back(&warp);
  }
  warp.ready |= 1u << thread.lane();
}

void Machine::wake(Warp& warp, uint32_t lanes) {
  for (; lanes; lanes &= lanes - 1) wake(*warp.cta->threads[warp.index * kLanes + __builtin_ctz(lanes)]);
}

void Machine::idle() {
  if (!bulk_copies.empty()) {
    copy_piece(random.below(uint32_t(bulk_copies.size())));
    return;
  }
  if (paused_.empty()) throw Error("deadlock: no thread can go on\n" + table());
  if (progress != progress_seen_) idle_rounds_ = 0;
  progress_seen_ = progress;
  if (++idle_rounds_ > kIdleRounds) throw Error("deadlock: threads only pause and look again\n" + table());
  if (launch_.meanwhile) launch_.meanwhile();
  for (Thread* thread : paused_) wake(*thread);
  paused_.clear();
}

void Machine::asynchronous_step() {
  if (!bulk_copies.empty() && random.below(2)) copy_piece(random.below(uint32_t(bulk_copies.size())));
  Warp& warp = *ready_[random.below(uint32_t(ready_.size()))];  // some warp of a CTA that runs
  Cta& cta = *warp.cta;
  copy_one(*cta.threads[random.below(uint32_t(cta.threads.size()))]);
  wgmma_one(cta.warps[random.below(uint32_t(cta.warps.size()))]);
}

Warp& Machine::pick_warp() {
  const auto any = [&]() -> Warp& { return *ready_[random.below(uint32_t(ready_.size()))]; };
  const auto same = [&](const Warp& x) {
    return favourite_ && (by_cta_ ? x.cta == favourite_->cta : &x == favourite_);
  };
  const auto before = [](const Warp* x, const Warp* y) {
    return std::pair(x->cta->index, x->index) < std::pair(y->cta->index, y->index);
  };
  if (++picks_ % 8192 == 0) favourite_ = nullptr;
  // Mostly the warp of the thread before: its stacks are in the cache.
  const bool stays = last_ && last_->ready && random.below(8);
  switch (schedule) {
    case Schedule::kGreedy: {
      if (favourite_ && favourite_->ready) return *favourite_;
      for (Warp* warp : ready_)
        if (same(*warp)) return *(favourite_ = warp);
      return *(favourite_ = &any());
    }
    case Schedule::kStarving: {
      if (!favourite_) favourite_ = &any();
      if (stays && !same(*last_)) return *last_;
      if (Warp& warp = any(); !same(warp)) return warp;
      for (Warp* warp : ready_)
        if (!same(*warp)) return *warp;
      return any();
    }
    case Schedule::kForwards:
      if (stays) return *last_;
      return **std::min_element(ready_.begin(), ready_.end(), before);
    case Schedule::kBackwards:
      if (stays) return *last_;
      return **std::max_element(ready_.begin(), ready_.end(), before);
    default: return stays ? *last_ : any();
  }
}

Thread& Machine::pick() {
  Warp& warp = pick_warp();
  last_ = &warp;
  int lane;
  if (schedule == Schedule::kForwards) {
    lane = __builtin_ctz(warp.ready);
  } else if (schedule == Schedule::kBackwards) {
    lane = kLanes - 1 - __builtin_clz(warp.ready);
  } else {
    const int turn = int(random.below(kLanes));
    const uint32_t turned = warp.ready >> turn | warp.ready << ((kLanes - turn) % kLanes);
    lane = (__builtin_ctz(turned) + turn) % kLanes;
  }
  warp.ready &= ~(1u << lane);
  if (!warp.ready) {
    ready_.back()->place = warp.place;
    std::swap(ready_[warp.place], ready_.back());
    ready_.pop_back();
  }
  return *warp.cta->threads[warp.index * kLanes + lane];
}

}  // namespace eqr::emu
