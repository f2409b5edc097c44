#include "cpu/loop/open_team.h"

#include "cpu/loop/backoff.h"

namespace eqr::cpu {

void OpenTeam::open() { door_.store(1, std::memory_order_release); }

void OpenTeam::call(Call call, const Packed* packed, void* workspace, const StepInput& input) noexcept {
  const int size = door_.load(std::memory_order_acquire);
  if (size == 1) return call(packed, workspace, input, Member{&barrier_, 0, 1});
  task_ = {call, packed, workspace, &input};
  const uint64_t number = (word_.load(std::memory_order_relaxed) >> kSizeBits) + 1;
  word_.store(number << kSizeBits | uint64_t(size), std::memory_order_release);
  call(packed, workspace, input, Member{&barrier_, 0, size});
  for (Backoff backoff; returned_.load(std::memory_order_acquire) != size - 1;) backoff.pause();
  returned_.store(0, std::memory_order_relaxed);
}

void OpenTeam::close() {
  door_.store(kClosed, std::memory_order_relaxed);
  word_.store(kOver, std::memory_order_release);
}

int OpenTeam::size() const { return door_.load(std::memory_order_relaxed); }

bool OpenTeam::join(int size, Ticket* ticket) {
  if (size == kClosed || !door_.compare_exchange_strong(size, size + 1, std::memory_order_acq_rel)) return false;
  *ticket = {.rank = size};
  return true;
}

OpenTeam::Turn OpenTeam::serve(Ticket* ticket) noexcept {
  const uint64_t word = word_.load(std::memory_order_acquire);
  if (word == kOver) return Turn::closed;
  const int size = int(word & ((uint64_t{1} << kSizeBits) - 1));
  if (word == ticket->seen || ticket->rank >= size) return Turn::none;
  ticket->seen = word;
  task_.call(task_.packed, task_.workspace, *task_.input, Member{&barrier_, ticket->rank, size});
  returned_.fetch_add(1, std::memory_order_release);
  return Turn::served;
}

}  // namespace eqr::cpu
