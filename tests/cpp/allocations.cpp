#include "allocations.h"

#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace eqr::test {
namespace {

std::atomic<int64_t> made{0}, asked{0}, live{0};
thread_local int64_t until_failure = -1;

void* allocate(size_t bytes, size_t alignment) {
  if (until_failure == 0) throw std::bad_alloc();
  if (until_failure > 0) --until_failure;
  void* p = nullptr;
  if (posix_memalign(&p, std::max(alignment, alignof(std::max_align_t)), bytes)) throw std::bad_alloc();
  made.fetch_add(1, std::memory_order_relaxed);
  asked.fetch_add(int64_t(bytes), std::memory_order_relaxed);
  live.fetch_add(int64_t(malloc_usable_size(p)), std::memory_order_relaxed);
  return p;
}

void release(void* p) {
  if (!p) return;
  live.fetch_sub(int64_t(malloc_usable_size(p)), std::memory_order_relaxed);
  std::free(p);
}

}  // namespace

int64_t allocations() { return made.load(std::memory_order_relaxed); }
int64_t allocated_bytes() { return asked.load(std::memory_order_relaxed); }
int64_t live_bytes() { return live.load(std::memory_order_relaxed); }
void fail_allocations_after(int64_t count) { until_failure = count; }

}  // namespace eqr::test

void* operator new(size_t bytes) { return eqr::test::allocate(bytes, 1); }
void* operator new[](size_t bytes) { return eqr::test::allocate(bytes, 1); }
void* operator new(size_t bytes, std::align_val_t at) { return eqr::test::allocate(bytes, size_t(at)); }
void* operator new[](size_t bytes, std::align_val_t at) { return eqr::test::allocate(bytes, size_t(at)); }
void operator delete(void* p) noexcept { eqr::test::release(p); }
void operator delete[](void* p) noexcept { eqr::test::release(p); }
void operator delete(void* p, size_t) noexcept { eqr::test::release(p); }
void operator delete[](void* p, size_t) noexcept { eqr::test::release(p); }
void operator delete(void* p, std::align_val_t) noexcept { eqr::test::release(p); }
void operator delete[](void* p, std::align_val_t) noexcept { eqr::test::release(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { eqr::test::release(p); }
void operator delete[](void* p, size_t, std::align_val_t) noexcept { eqr::test::release(p); }
