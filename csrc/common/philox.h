// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), one generator for every
// backend. Layout version 1, the same as eqr_kernels/noise.py:
//   key     (seed, restart)
//   counter (element / 4, step << 8 | stream, id low word, id high word); the word of an element is element % 4
// Free of the standard library's templates, so that a file built for one instruction set cannot lend its code to
// another.
#pragma once

#include <stdint.h>

#include "common/inline.h"

namespace eqr {

// Streams: the two start states, and from the third on one for each update of an outer step.
constexpr uint32_t kStreamH = 0, kStreamL = 1, kFirstUpdate = 2;

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;

struct Words4 {
  uint32_t w0, w1, w2, w3;
};

struct Key {
  uint32_t k0, k1;
};

EQR_INLINE Key next_key(Key k) { return {k.k0 + 0x9E3779B9u, k.k1 + 0xBB67AE85u}; }

EQR_INLINE Words4 philox4x32_10(Words4 c, Key k) {
  for (int round = 0; round < 10; ++round, k = next_key(k)) {
    const uint64_t p0 = uint64_t{kPhiloxM0} * c.w0, p1 = uint64_t{kPhiloxM1} * c.w2;
    c = {uint32_t(p1 >> 32) ^ c.w1 ^ k.k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.w3 ^ k.k1, uint32_t(p0)};
  }
  return c;
}

// What a trajectory's numbers depend on besides the element: a row of the `rng` tensor and the stream.
struct RngRow {
  Key key;
  uint32_t step_stream, id_low, id_high;
};

EQR_INLINE RngRow rng_row(const int64_t* rng /* [4]: seed, restart, id, step */, uint32_t stream) {
  const uint64_t id = uint64_t(rng[2]);
  return {{uint32_t(rng[0]), uint32_t(rng[1])}, uint32_t(rng[3]) << 8 | stream, uint32_t(id), uint32_t(id >> 32)};
}

EQR_INLINE Words4 philox_block(const RngRow& r, uint32_t block /* element / 4 */) {
  return philox4x32_10({block, r.step_stream, r.id_low, r.id_high}, r.key);
}

}  // namespace eqr
