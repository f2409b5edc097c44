// How a team divides a phase of work. Every member begins with its own part of the items, in order, so that what it
// prefetches is what it needs next; then it takes over what others have not begun, from the end. Who computes an item
// must not change the result.
#pragma once

#include "cpu/kernels/simd.h"
#include "cpu/loop/team.h"

namespace eqr::cpu::EQR_ISA {

class Share {
 public:
  // Both are the team's, zero when new.
  Share(const Member& m, uint32_t* phase, uint32_t* claims) : m_(m), last_(phase), phase_(*phase), claims_(claims) {}

  // Calls work(item) for each of 0..items-1 that no other member takes. It returns when all are taken, not when all are
  // done. Two phases need no sync between them but for what the work itself wants, or where members of a rank above
  // `members`, which take nothing, leave early.
  template <class Work>
  [[gnu::always_inline]] void each(int64_t items, Work&& work, int64_t members = INT64_MAX) {
    if (m_.size == 1) {
      for (int64_t item = 0; item < items; ++item) work(item);
      return;
    }
    ++phase_;
    if (m_.rank >= members) return;
    for (int i = 0; i < m_.size; ++i) {
      const Member owner{nullptr, (m_.rank + i) % m_.size, m_.size};
      const int64_t begin = owner.begin(items), end = owner.end(items);
      for (int64_t n = begin; n < end; ++n) {
        const int64_t item = i == 0 ? n : begin + end - 1 - n;
        if (claim(item)) work(item);
      }
    }
  }

  // After the last phase of a call, and before the sync that ends it; another must have gone before.
  [[gnu::always_inline]] void end() {
    if (m_.rank == 0) *last_ = phase_;
  }

 private:
  // A claim of a later phase means that whoever made it found every item of this one taken.
  [[gnu::always_inline]] bool claim(int64_t item) {
    uint32_t seen = __atomic_load_n(claims_ + item, __ATOMIC_RELAXED);
    return int32_t(seen - phase_) < 0 &&
           __atomic_compare_exchange_n(claims_ + item, &seen, phase_, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  }

  const Member m_;
  uint32_t* const last_;
  uint32_t phase_;
  uint32_t* const claims_;
};

}  // namespace eqr::cpu::EQR_ISA
