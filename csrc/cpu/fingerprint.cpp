#include "cpu/fingerprint.h"

#include <string.h>

namespace eqr::cpu {
namespace {

constexpr uint64_t kOdd = 0x9E3779B97F4A7C15u, kOdd2 = 0xD1B54A32D192ED03u;
constexpr int kLanes = 8;  // independent, so that the multiplications overlap

// One-to-one in `state` for a given word and in `word` for a given state: a single difference can never be lost. A
// product carries it to the higher bits only: a flipped top bit stays one bit. So the halves change places, and the
// second product spreads it, or a bit of the next word could undo it.
inline uint64_t absorb(uint64_t state, uint64_t word) {
  const uint64_t x = (state ^ word) * kOdd;
  return (x << 32 | x >> 32) * kOdd2;
}

inline uint64_t load(const char* at) {
  uint64_t word;
  memcpy(&word, at, sizeof word);
  return word;
}

}  // namespace

uint64_t fingerprint(const void* data, int64_t bytes, uint64_t seed) {
  const char* at = static_cast<const char*>(data);
  uint64_t lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = absorb(seed, uint64_t(l + 1) * kOdd);
  int64_t left = bytes;
  for (; left >= 8 * kLanes; left -= 8 * kLanes, at += 8 * kLanes)
#pragma GCC unroll 8  // keeps the lanes in registers
    for (int l = 0; l < kLanes; ++l) lanes[l] = absorb(lanes[l], load(at + 8 * l));
  for (int l = 0; left > 0; ++l) {
    uint64_t word = 0;
    const int64_t part = left < 8 ? left : 8;
    memcpy(&word, at, size_t(part));
    lanes[l] = absorb(lanes[l], word);
    left -= part, at += part;
  }
  uint64_t hash = absorb(seed, uint64_t(bytes));
  for (uint64_t lane : lanes) hash = absorb(hash, lane);
  hash = (hash ^ hash >> 32) * kOdd;
  hash = (hash ^ hash >> 29) * kOdd;
  return hash ^ hash >> 32;
}

}  // namespace eqr::cpu
