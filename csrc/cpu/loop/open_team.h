// A team that other threads may join between two calls of a kernel.
#pragma once

#include <stdint.h>

#include <atomic>

#include "cpu/operator.h"

namespace eqr::cpu {

// One thread, the owner, opens the team, makes its calls, and closes it for good. Any other may take a ticket, which is
// its rank, and then serves until the team closes.
//
// Invariants:
// - A ticket is given only by a compare-exchange on an open door, so ranks are 0, 1, 2... without a gap, and a member
//   keeps its rank until the team closes.
// - The owner looks at the door once a call. Whoever holds a ticket below that count takes part, everybody else waits.
// - A call's number and size are one atomic word, so a member never sees the one without the other; it reads the task
//   only when it takes part.
// - The owner writes the task, and starts another call, only when every member that takes part has returned from the
//   one before. So nobody is left in the barrier when the size changes, and no part of a call is missed.
// - A closed door never opens again, and the closing word stays: a ticket that came too late is told so.
class OpenTeam {
 public:
  using Call = void (*)(const Packed*, void* workspace, const StepInput&, const Member&);

  // The owner's.
  void open();
  void call(Call, const Packed*, void* workspace, const StepInput&) noexcept;
  void close();

  // How many there are or wait to be, the owner included; 0 unless open.
  int size() const;

  struct Ticket {
    int rank = 0;
    uint64_t seen = 0;  // the word of the last call
  };
  // Fails when the team's size is no longer `size`.
  bool join(int size, Ticket*);

  enum class Turn { none, served, closed };
  // Takes part in the call that is going on, if there is one that this member has not seen.
  Turn serve(Ticket*) noexcept;

 private:
  static constexpr int kClosed = 0;
  static constexpr uint64_t kOver = ~uint64_t{0};
  static constexpr int kSizeBits = 24;

  struct Task {
    Call call;
    const Packed* packed;
    void* workspace;
    const StepInput* input;
  };

  Barrier barrier_{};
  alignas(64) std::atomic<int> door_{kClosed};  // tickets given, or kClosed
  alignas(64) std::atomic<uint64_t> word_{0};   // number of the call << kSizeBits | its size; kOver
  Task task_{};
  alignas(64) std::atomic<int> returned_{0};  // members, the owner apart, that have returned from the call
};

}  // namespace eqr::cpu
