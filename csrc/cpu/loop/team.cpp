#include "cpu/loop/team.h"

#include "cpu/loop/backoff.h"

namespace eqr::cpu {

void Barrier::wait(int size) {
  // It cannot change before this member has arrived, so one bit tells a round from the next.
  const int32_t round = __atomic_load_n(&phase, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == size) {
    __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&phase, round ^ 1, __ATOMIC_RELEASE);
    return;
  }
  for (Backoff backoff; __atomic_load_n(&phase, __ATOMIC_ACQUIRE) == round;) backoff.pause();
}

}  // namespace eqr::cpu
