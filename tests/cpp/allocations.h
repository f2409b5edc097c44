// The test program's operator new counts what it gives, and can be made to fail.
#pragma once

#include <stdint.h>

namespace eqr::test {

// By any thread, so far.
int64_t allocations();
int64_t allocated_bytes();
int64_t live_bytes();  // allocated and not freed, as the allocator rounds them

// The thread's allocations fail from the one after the next `count` on; -1: never.
void fail_allocations_after(int64_t count);

}  // namespace eqr::test
