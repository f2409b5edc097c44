// Four consecutive elements' random numbers at a time: a block of Philox, whose layout is that of csrc/common/philox.h.
#pragma once

#include "common/philox.h"
#include "cuda/device.h"

namespace eqr::cuda {

struct Four {
  float v[4];
};

EQR_DEVICE float uniform(uint32_t word) { return (float(word >> 9) + 0.5f) * 0x1p-23f; }

// Standard normals by Box and Muller.
template <class Be>
EQR_DEVICE Four normals(const RngRow& row, uint32_t block) {
  const Words4 w = philox_block(row, block);
  const uint32_t words[4] = {w.w0, w.w1, w.w2, w.w3};
  Four out;
  EQR_UNROLL
  for (int i = 0; i < 4; i += 2) {
    const float radius = Be::sqrt(-2.0f * Be::log(uniform(words[i])));
    float sine, cosine;
    Be::sincos_pi(2.0f * uniform(words[i + 1]), &sine, &cosine);
    out.v[i] = radius * cosine;
    out.v[i + 1] = radius * sine;
  }
  return out;
}

// Normals cut at +-2 and divided by their standard deviation 0.8796: sqrt(2) / 0.8796 erfinv(erf(sqrt(2)) (2 u - 1)).
template <class Be>
EQR_DEVICE Four truncated_normals(const RngRow& row, uint32_t block) {
  const Words4 w = philox_block(row, block);
  const uint32_t words[4] = {w.w0, w.w1, w.w2, w.w3};
  constexpr float kErf = 0.95449973610364158560f, kScale = 1.41421356237309504880f / 0.87962566103423978f;
  constexpr float kMost = 2.0f / 0.87962566103423978f;
  Four out;
  EQR_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float x = kScale * Be::erfinv(kErf * (2.0f * uniform(words[i]) - 1.0f));
    out.v[i] = x < -kMost ? -kMost : x > kMost ? kMost : x;
  }
  return out;
}

}  // namespace eqr::cuda
