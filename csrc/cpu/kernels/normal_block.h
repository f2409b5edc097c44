// A block of one trajectory's random words and standard normals. Included only by the files that are built once per
// instruction set. Every operation is an integer operation or an IEEE add, multiply or square root, and contraction is
// off, so all instruction sets give the same bits.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/philox.h"
#include "cpu/block.h"

namespace eqr::cpu {

constexpr int kCounters = kBlock / 4;

// A work item: one block of one trajectory.
struct Span {
  int64_t n, start;  // row, and first element of the block in the whole [n, row] tensor
  int count;         // elements
  uint32_t first_counter;
  int counters;
};

EQR_INLINE Span span(int64_t item, int64_t row, int64_t blocks) {
  const int64_t n = item / blocks, block = item % blocks, left = row - block * kBlock;
  const int count = left < kBlock ? int(left) : kBlock;
  return {n, n * row + block * kBlock, count, uint32_t(block * kCounters), (count + 3) / 4};
}

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kPairs = kVectorBytes / 8;
constexpr uint64_t kLow = 0xFFFFFFFFu;

// 32-bit words in the low halves of 64-bit lanes, whose high halves hold anything: what the widening multiply reads.
typedef uint64_t Lanes __attribute__((vector_size(kVectorBytes)));

EQR_INLINE Lanes multiply_low(Lanes a, uint32_t b) {
#if defined(__AVX512F__)
  return Lanes(_mm512_mul_epu32(__m512i(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return Lanes(_mm256_mul_epu32(__m256i(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return Lanes(_mm_mul_epu32(__m128i(a), _mm_set1_epi64x(b)));
#else
  return (a & kLow) * uint64_t{b};
#endif
}

// words[j][i]: word j of counter block first + i, for i in [0, counters) and on to the next multiple of 2 * kPairs.
// A compiler's own vectorisation of the scalar philox_block is three times slower (it multiplies in 64 bits).
EQR_INLINE void words_block(const RngRow& row, uint32_t first, int counters, uint32_t (*__restrict words)[kCounters]) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are stored as the two halves of 64-bit lanes");
  Lanes even_counter;
  for (int l = 0; l < kPairs; ++l) even_counter[l] = 2 * uint64_t(l);
  for (int i = 0; i < counters; i += 2 * kPairs) {
    Lanes c0[2], c1[2], c2[2], c3[2];
    for (int odd = 0; odd < 2; ++odd) {
      c0[odd] = even_counter + uint64_t{first + uint32_t(i + odd)};
      c1[odd] = Lanes{} + row.step_stream;
      c2[odd] = Lanes{} + row.id_low;
      c3[odd] = Lanes{} + row.id_high;
    }
    Key key = row.key;
    for (int round = 0; round < 10; ++round, key = next_key(key))
      for (int odd = 0; odd < 2; ++odd) {
        const Lanes p0 = multiply_low(c0[odd], kPhiloxM0), p1 = multiply_low(c2[odd], kPhiloxM1);
        c0[odd] = (p1 >> 32) ^ c1[odd] ^ uint64_t { key.k0 };
        c2[odd] = (p0 >> 32) ^ c3[odd] ^ uint64_t { key.k1 };
        c1[odd] = p1;
        c3[odd] = p0;
      }
    const Lanes merged[4] = {(c0[0] & kLow) | c0[1] << 32, (c1[0] & kLow) | c1[1] << 32, (c2[0] & kLow) | c2[1] << 32,
                             (c3[0] & kLow) | c3[1] << 32};
    for (int j = 0; j < 4; ++j) memcpy(words[j] + i, &merged[j], sizeof(Lanes));
  }
}

EQR_INLINE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

EQR_INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// ln u for u in (0, 1]. It is split at sqrt(1/2) and fitted (minimax, 6e-9) on ln(1 + f) = f - f^2/2 + f^3 p(f); f is
// exact, so values close to u = 1 keep their relative accuracy.
EQR_INLINE float logarithm(float u) {
  const int32_t exponent = int32_t(as_bits(u) - 0x3F3504F3u) >> 23;
  const float f = as_float(as_bits(u) - (uint32_t(exponent) << 23)) - 1.0f;
  float p = -0x1.38b4ccp-4f;
  p = p * f + 0x1.055b46p-3f;
  p = p * f - 0x1.0d8552p-3f;
  p = p * f + 0x1.22da22p-3f;
  p = p * f - 0x1.547244p-3f;
  p = p * f + 0x1.99a008p-3f;
  p = p * f - 0x1.000228p-2f;
  p = p * f + 0x1.555554p-2f;
  const float e = float(exponent), f2 = f * f;
  // ln 2 in two parts, the first with trailing zeros so that e times it is exact.
  return e * 0x1.62ep-1f + (f + (f2 * (p * f - 0.5f) + e * 0x1.0bfbe8p-15f));
}

// A word's top 23 bits and a half, in (0, 1).
EQR_INLINE float uniform(uint32_t w) { return (float(int32_t(w >> 9)) + 0.5f) * 0x1p-23f; }

EQR_INLINE float radius(uint32_t w) { return sqrtf(-2.0f * logarithm(uniform(w))); }

// cos and sin of 2 pi u, u = (k + 0.5) * 2^-23, k the top 23 bits of w. The quadrant comes off in integers, so the
// rest, r in (-1/2, 1/2) quarter turns, is exact.
EQR_INLINE void turn(uint32_t w, float* cosine, float* sine) {
  const int32_t k = int32_t(w >> 9);
  const int32_t quadrant = (k + (1 << 20)) >> 21;
  const float r = (float(k - (quadrant << 21)) + 0.5f) * 0x1p-21f;
  const float y = r * r;
  float s = -0x1.2d9302p-8f;
  s = s * y + 0x1.465e92p-4f;
  s = s * y - 0x1.4abbbap-1f;
  s = s * y + 0x1.921fb6p+0f;
  s = s * r;
  float c = 0x1.d9d57cp-11f;
  c = c * y - 0x1.55c5e0p-6f;
  c = c * y + 0x1.03c1dep-2f;
  c = c * y - 0x1.3bd3ccp+0f;
  c = c * y + 1.0f;
  const uint32_t swap = (as_bits(c) ^ as_bits(s)) & uint32_t(-(quadrant & 1));
  *cosine = as_float(as_bits(c) ^ swap ^ uint32_t((quadrant + 1) & 2) << 30);
  *sine = as_float(as_bits(s) ^ swap ^ uint32_t(quadrant & 2) << 30);
}

// eps[0 .. 4 * counters): the normals of elements 4 * first, 4 * first + 1, ... of a trajectory's stream.
EQR_INLINE void normal_block(const RngRow& row, uint32_t first, int counters, float* __restrict eps) {
  alignas(64) uint32_t words[4][kCounters];
  words_block(row, first, counters, words);
  for (int i = 0; i < counters; ++i) {
    float c0, s0, c1, s1;
    turn(words[1][i], &c0, &s0);
    turn(words[3][i], &c1, &s1);
    const float r0 = radius(words[0][i]), r1 = radius(words[2][i]);
    eps[4 * i] = r0 * c0;
    eps[4 * i + 1] = r0 * s0;
    eps[4 * i + 2] = r1 * c1;
    eps[4 * i + 3] = r1 * s1;
  }
}

}  // namespace eqr::cpu
