#include "races.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace eqr::emu::races {
namespace {

constexpr int kCell = 2;

bool before(const Access& access, const View& view) {
  return !access.tick || access.number == view.number || (*view.before)[access.number] >= access.tick;
}

int engine(const Cta& cta) { return int(cta.peers.size() * cta.threads.size()) + cta.rank; }

void merge(Clock& into, const Clock& other) {
  for (size_t i = 0; i < other.size(); ++i) into[i] = std::max(into[i], other[i]);
}

std::string name_of(const Cta& cta, const Access& access) {
  const int threads = int(cta.threads.size());
  if (access.number >= threads * int(cta.peers.size())) return "a bulk copy";
  return "thread " + std::to_string(access.number % threads) + " of CTA " +
         std::to_string(cta.peers[access.number / threads]->index);
}

[[noreturn]] void found(const Thread& by, const Cta& cta, uint32_t offset, const std::string& what, const void* code) {
  machine->stop("race: " + by.name() + " " + what + " byte " + std::to_string(offset) +
                " of the shared memory of CTA " + std::to_string(cta.index) + code_text(code));
}

}  // namespace

void start(Cta& cta) {
  if (!kOn) return;
  cta.cells.assign(machine->shared_bytes() / kCell + 1, {});
  const auto nothing = std::make_shared<const Clock>(cta.peers.size() * (cta.threads.size() + 1));
  for (const auto& thread : cta.threads) {
    thread->view.number = cta.rank * int(cta.threads.size()) + thread->index;
    thread->view.before = nothing;
  }
}

void access(Thread& by, Cta& cta, uint32_t offset, int bytes, How how, const void* code, bool note) {
  if (!kOn) return;
  const View& view = by.view;
  const Access mine{view.tick, uint16_t(view.number)};
  const char* verb = how == How::kStore ? "stores to" : how == How::kLoad ? "loads" : "has wgmma read";
  for (uint32_t at = offset; at < offset + bytes; at += kCell) {
    Cell& cell = cta.cells[at / kCell];
    if (!before(cell.store, view))
      found(by, cta, at,
            std::string(verb) + " what " + name_of(cta, cell.store) + " stored with no barrier between, at", code);
    if (how == How::kStore) {
      for (const Access& load : cell.loads)
        if (!before(load, view))
          found(by, cta, at, "stores to what " + name_of(cta, load) + " loaded with no barrier between, at", code);
      if (note) cell = {mine, {}};
      continue;
    }
    if (how == How::kLoadAsync && cell.store.tick && cell.store.number < engine(cta) - cta.rank) {
      const Thread& writer = *cta.threads[cell.store.number % cta.threads.size()];
      if (writer.view.fenced < cell.store.tick)
        found(by, cta, at, "has wgmma read what " + name_of(cta, cell.store) + " stored with no async_fence behind, at",
              code);
    }
    if (!note) continue;
    Access* place = nullptr;
    for (Access& load : cell.loads)
      if (!load.tick || load.number == mine.number || before(load, view)) place = &load;
    (place ? *place : cell.loads[machine->random.below(3)]) = mine;
  }
}

uint32_t bulk_store(Thread& by, Cta& cta, uint32_t offset, int bytes) {
  if (!kOn) return 0;
  access(by, cta, offset, bytes, How::kStore, nullptr, false);
  const Access copy{++cta.bulk_tick, uint16_t(engine(cta))};
  for (uint32_t at = offset; at < offset + bytes; at += kCell) cta.cells[at / kCell] = {copy, {}};
  return copy.tick;
}

void meet(const std::vector<std::pair<Warp*, uint32_t>>& lanes) {
  if (!kOn) return;
  const auto each = [&](const auto& visit) {
    for (auto [warp, mask] : lanes)
      for (; mask; mask &= mask - 1) visit(warp->cta->threads[warp->index * kLanes + __builtin_ctz(mask)]->view);
  };
  std::shared_ptr<Clock> all;
  const Clock* last = nullptr;
  each([&](View& view) {
    if (!all) {
      all = std::make_shared<Clock>(*view.before);
    } else if (view.before.get() != last) {
      merge(*all, *view.before);
    }
    last = view.before.get();
  });
  each([&](View& view) { (*all)[view.number] = view.tick++; });
  each([&](View& view) { view.before = all; });
}

void arrive(Thread& thread, Mbarrier& barrier) {
  if (!kOn) return;
  View& view = thread.view;
  barrier.told.resize(view.before->size());
  merge(barrier.told, *view.before);
  barrier.told[view.number] = view.tick++;
}

void arrive(const Cta& cta, uint32_t tick, Mbarrier& barrier) {
  if (!kOn) return;
  barrier.told.resize(cta.peers.size() * (cta.threads.size() + 1));
  uint32_t& told = barrier.told[engine(cta)];
  told = std::max(told, tick);
}

void complete(Mbarrier& barrier) {
  if (kOn) barrier.completed = barrier.told;
}

void pass(Thread& thread, const Mbarrier& barrier) {
  if (!kOn || barrier.completed.empty()) return;
  auto clock = std::make_shared<Clock>(*thread.view.before);
  merge(*clock, barrier.completed);
  thread.view.before = clock;
}

void fence(Thread& thread) {
  if (kOn) thread.view.fenced = thread.view.tick++;
}

}  // namespace eqr::emu::races

#if defined(EQR_RACES)
// What the compiler calls.
namespace {

using namespace eqr::emu;

void seen(void* p, long bytes, races::How how, const void* code) {
  if (!machine || !machine->current) return;
  Thread& by = *machine->current;
  int64_t offset;
  Cta* cta;
  if (!machine->find_shared(p, &cta, &offset)) return;
  if (cta != by.cta || offset < 0 || offset + bytes > machine->shared_bytes())
    machine->stop(by.name() + (how == races::How::kStore ? " stores" : " loads") + " out of bounds: at byte " +
                  std::to_string(static_cast<char*>(p) - by.cta->shared) + " of " +
                  std::to_string(machine->shared_bytes()) + " bytes of shared memory" + code_text(code));
  races::access(by, *cta, uint32_t(offset), int(bytes), how, code);
}

// By what is loaded or stored whole, and would fault on a GPU.
void seen_aligned(void* p, long bytes, races::How how, const void* code) {
  if (reinterpret_cast<uintptr_t>(p) % uintptr_t(bytes) && machine && machine->current)
    machine->stop(machine->current->name() + " loads or stores " + std::to_string(bytes) +
                  " bytes that are not at a multiple of that" + code_text(code));
  seen(p, bytes, how, code);
}

}  // namespace

#define EQR_SEEN(bytes) \
  void __tsan_read##bytes(void* p) { seen_aligned(p, bytes, races::How::kLoad, __builtin_return_address(0)); } \
  void __tsan_write##bytes(void* p) { seen_aligned(p, bytes, races::How::kStore, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##bytes(void* p) { seen(p, bytes, races::How::kLoad, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* p) { seen(p, bytes, races::How::kStore, __builtin_return_address(0)); }
// Of the host's own library, in a program of one thread.
#define EQR_ATOMIC(bits, Type) \
  Type __tsan_atomic##bits##_load(const volatile Type* p, int) { return *p; } \
  void __tsan_atomic##bits##_store(volatile Type* p, Type x, int) { *p = x; } \
  Type __tsan_atomic##bits##_fetch_add(volatile Type* p, Type x, int) { \
    const Type before = *p; \
    *p = Type(before + x); \
    return before; \
  } \
  Type __tsan_atomic##bits##_fetch_sub(volatile Type* p, Type x, int) { \
    const Type before = *p; \
    *p = Type(before - x); \
    return before; \
  } \
  Type __tsan_atomic##bits##_exchange(volatile Type* p, Type x, int) { \
    const Type before = *p; \
    *p = x; \
    return before; \
  } \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile Type* p, Type* old, Type x, int, int) { \
    if (*p == *old) return *p = x, 1; \
    *old = *p; \
    return 0; \
  }

extern "C" {
EQR_ATOMIC(8, uint8_t)
EQR_ATOMIC(32, uint32_t)
EQR_ATOMIC(64, uint64_t)
EQR_SEEN(1)
EQR_SEEN(2)
EQR_SEEN(4)
EQR_SEEN(8)
EQR_SEEN(16)
void __tsan_read_range(void* p, long bytes) { seen(p, bytes, races::How::kLoad, __builtin_return_address(0)); }
void __tsan_write_range(void* p, long bytes) { seen(p, bytes, races::How::kStore, __builtin_return_address(0)); }
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
#endif
