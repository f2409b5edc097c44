#pragma once

#include <bit>
#include <cstdint>

namespace eqr::emu {

inline float from_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }
inline float half_of(uint32_t pair, int which) { return from_bf16(uint16_t(pair >> (16 * which))); }

// To the nearest, ties to even; NaN becomes the GPU's NaN.
inline uint16_t to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return 0x7FFF;
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace eqr::emu
