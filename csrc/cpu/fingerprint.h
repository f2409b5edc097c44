// A fingerprint of a buffer's bytes, to notice that it has changed. Not cryptographic.
#pragma once

#include <stdint.h>

namespace eqr::cpu {

// Depends on every byte, its position, `bytes` and `seed`. Two buffers of one length that differ within one aligned
// group of eight bytes never have the same fingerprint. Another byte order gives another value.
uint64_t fingerprint(const void* data, int64_t bytes, uint64_t seed);

}  // namespace eqr::cpu
