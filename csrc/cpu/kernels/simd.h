// Vectors of kLanes floats, and the few operations on them that a compiler does not find by itself. Everything that is
// not guarded by a feature of the compiler's target is generic, so that a level keeps its vector width, and with it its
// layouts and its order of operations, where its instructions are missing (EQR_EMULATE_AVX512).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/inline.h"

#if defined(EQR_ISA_IS_avx512) || defined(EQR_ISA_IS_avx512_bf16) || defined(EQR_ISA_IS_amx)
#define EQR_LANES 16
#elif defined(EQR_ISA_IS_avx2)
#define EQR_LANES 8
#else
#define EQR_LANES 4
#endif
#if EQR_LANES == 8 && defined(__AVX2__) && defined(__FMA__)
#define EQR_USE_AVX2
#endif

namespace eqr::cpu::EQR_ISA {

constexpr int kLanes = EQR_LANES;
#if defined(EQR_ISA_IS_avx512_bf16) || defined(EQR_ISA_IS_amx)
constexpr bool kHasBf16 = true;  // dot products of bf16 pairs, and of int8 quadruples
#else
constexpr bool kHasBf16 = false;
#endif
#if defined(EQR_ISA_IS_amx)
constexpr bool kHasAmx = true;  // both, of whole tiles
#else
constexpr bool kHasAmx = false;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));  // kLanes 16-bit values

EQR_INLINE Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
EQR_INLINE void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
EQR_INLINE IVec load_ints(const int32_t* p) {
  IVec v;
  memcpy(&v, p, sizeof v);
  return v;
}

EQR_INLINE Vec splat(float x) {
#if defined(__AVX512F__)
  return Vec(_mm512_set1_ps(x));
#elif defined(EQR_USE_AVX2)
  return Vec(_mm256_set1_ps(x));
#else
  return x - Vec{};
#endif
}
EQR_INLINE IVec splat_int(int32_t x) { return x - IVec{}; }

template <class To, class From>
EQR_INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  memcpy(&out, &v, sizeof out);
  return out;
}

EQR_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return Vec(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(EQR_USE_AVX2)
  return Vec(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif defined(__FMA__)
  Vec out;
  for (int l = 0; l < kLanes; ++l) out[l] = __builtin_fmaf(a[l], b[l], c[l]);
  return out;
#else
  return a * b + c;
#endif
}

EQR_INLINE Vec square_root(Vec a) {
#if defined(__AVX512F__)
  return Vec(_mm512_sqrt_ps(__m512(a)));
#elif defined(EQR_USE_AVX2)
  return Vec(_mm256_sqrt_ps(__m256(a)));
#else
  Vec out;
  for (int l = 0; l < kLanes; ++l) out[l] = __builtin_sqrtf(a[l]);
  return out;
#endif
}

// b where either is NaN.
EQR_INLINE Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return Vec(_mm512_max_ps(__m512(a), __m512(b)));
#elif defined(EQR_USE_AVX2)
  return Vec(_mm256_max_ps(__m256(a), __m256(b)));
#else
  return a > b ? a : b;
#endif
}
EQR_INLINE Vec minimum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return Vec(_mm512_min_ps(__m512(a), __m512(b)));
#elif defined(EQR_USE_AVX2)
  return Vec(_mm256_min_ps(__m256(a), __m256(b)));
#else
  return a < b ? a : b;
#endif
}
EQR_INLINE Vec absolute(Vec a) { return bits<Vec>(bits<UVec>(a) & 0x7FFFFFFFu); }

// v with the lanes of each pair of neighbouring groups of `kGroup` exchanged.
template <int kGroup>
EQR_INLINE Vec exchange(Vec v) {
  constexpr int g = kGroup;
#if EQR_LANES == 16
  return __builtin_shufflevector(v, v, 0 ^ g, 1 ^ g, 2 ^ g, 3 ^ g, 4 ^ g, 5 ^ g, 6 ^ g, 7 ^ g, 8 ^ g, 9 ^ g, 10 ^ g,
                                 11 ^ g, 12 ^ g, 13 ^ g, 14 ^ g, 15 ^ g);
#elif EQR_LANES == 8
  return __builtin_shufflevector(v, v, 0 ^ g, 1 ^ g, 2 ^ g, 3 ^ g, 4 ^ g, 5 ^ g, 6 ^ g, 7 ^ g);
#else
  return __builtin_shufflevector(v, v, 0 ^ g, 1 ^ g, 2 ^ g, 3 ^ g);
#endif
}

// v in its first `count` lanes, 0 in the others.
EQR_INLINE Vec first_lanes(Vec v, int64_t count) {
  for (int l = 0; l < kLanes; ++l) v[l] = l < count ? v[l] : 0.0f;
  return v;
}

// Over all lanes, as a tree: in an order of its own for each vector width.
template <int kGroup = kLanes / 2>
EQR_INLINE float sum(Vec v) {
  v += exchange<kGroup>(v);
  if constexpr (kGroup > 1)
    return sum<kGroup / 2>(v);
  else
    return v[0];
}
template <int kGroup = kLanes / 2>
EQR_INLINE float largest(Vec v) {
  v = maximum(v, exchange<kGroup>(v));
  if constexpr (kGroup > 1)
    return largest<kGroup / 2>(v);
  else
    return v[0];
}

// Nearest integer, ties to even; |a| < 2^22.
EQR_INLINE IVec nearest_int(Vec a) {
  const Vec magic = splat(0x1.8p23f);
  return bits<IVec>(a + magic) - bits<IVec>(magic);
}

// 2^x for x <= 126, to 2e-7 of its value, or where that is rounded to bf16 (kRough) to 8e-5; below 2^-126 it may be
// anything in between. NaN stays NaN.
template <bool kRough = false>
EQR_INLINE Vec power_of_two(Vec x) {
#if defined(__AVX512F__)
  const Vec n = Vec(_mm512_roundscale_ps(__m512(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)), f = x - n;
#else
  const Vec magic = splat(0x1.8p23f);
  x = maximum(splat(-126.0f), x);
  const Vec shifted = x + magic, f = x - (shifted - magic);
#endif
  Vec p;  // 2^f, minimax on |f| <= 1/2
  if constexpr (kRough) {
    p = splat(0x1.c3f760p-5f);
    p = fma(p, f, splat(0x1.f0de1ap-3f));
    p = fma(p, f, splat(0x1.62f31ap-1f));
    p = fma(p, f, splat(0x1.fff692p-1f));
  } else {
    p = splat(0x1.5d87dcp-10f);
    p = fma(p, f, splat(0x1.3cbe58p-7f));
    p = fma(p, f, splat(0x1.c6b26ep-5f));
    p = fma(p, f, splat(0x1.ebfa4ep-3f));
    p = fma(p, f, splat(0x1.62e42ep-1f));
    p = fma(p, f, splat(1.0f));
  }
#if defined(__AVX512F__)
  return Vec(_mm512_scalef_ps(__m512(p), __m512(n)));
#else
  return p * bits<Vec>((bits<IVec>(shifted) << 23) + 0x3F800000);
#endif
}

// a / b for 1 <= b <= 2^126, to 1.5e-7 of its value, or to 7e-5 (kRough).
template <bool kRough>
EQR_INLINE Vec quotient(Vec a, Vec b) {
#if defined(__AVX512F__)
  Vec reciprocal = Vec(_mm512_rcp14_ps(__m512(b)));  // a division takes as long as ten products
  if constexpr (!kRough) reciprocal = reciprocal * fma(-b, reciprocal, splat(2.0f));
  return a * reciprocal;
#else
  return a / b;
#endif
}

// silu(gate) * up = gate / (1 + e^-gate) up
template <bool kRough>
EQR_INLINE Vec swiglu(Vec gate, Vec up) {
  const Vec power = minimum(splat(126.0f), gate * splat(-0x1.715476p0f));
  return quotient<kRough>(gate * up, splat(1.0f) + power_of_two<kRough>(power));
}

// ---- bf16 ----------------------------------------------------------------------------------------------------------

// To the nearest bf16, ties to even, in the high halves; the low halves hold garbage. NaN stays NaN.
EQR_INLINE UVec round_high(Vec a) {
  const UVec b = bits<UVec>(a), rounded = b + 0x7FFFu + ((b >> 16) & 1u);
  return a == a ? rounded : b | 0x00400000u;
}

EQR_INLINE Vec round_bf16(Vec a) { return bits<Vec>(round_high(a) & 0xFFFF0000u); }

EQR_INLINE float round_bf16(float a) {
  uint32_t b;
  memcpy(&b, &a, 4);
  b = a == a ? (b + 0x7FFFu + ((b >> 16) & 1u)) & 0xFFFF0000u : (b | 0x00400000u) & 0xFFFF0000u;
  memcpy(&a, &b, 4);
  return a;
}

EQR_INLINE uint16_t to_bf16(float a) {
  const float rounded = round_bf16(a);
  uint32_t b;
  memcpy(&b, &rounded, 4);
  return uint16_t(b >> 16);
}

EQR_INLINE void store_bf16(uint16_t* p, Vec a) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh(__m512(a));
  memcpy(p, &h, sizeof h);
#else
  const HalfVec h = __builtin_convertvector(round_high(a) >> 16, HalfVec);
  memcpy(p, &h, sizeof h);
#endif
}

// a, then b
EQR_INLINE void store_bf16(uint16_t* p, Vec a, Vec b) {
#if defined(__AVX512BF16__)
  const __m512bh both = _mm512_cvtne2ps_pbh(__m512(b), __m512(a));
  memcpy(p, &both, sizeof both);
#else
  store_bf16(p, a);
  store_bf16(p + kLanes, b);
#endif
}

// Lane l of the result holds the pair (a[l], b[l]) as bf16, a in the low half.
EQR_INLINE UVec pair_bf16(Vec a, Vec b) {
#if defined(__AVX512BF16__)
  const __m512i both = __m512i(_mm512_cvtne2ps_pbh(__m512(b), __m512(a)));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return UVec(_mm512_permutexvar_epi16(order, both));
#else
  return (round_high(a) >> 16) | (round_high(b) & 0xFFFF0000u);
#endif
}

EQR_INLINE Vec load_bf16(const uint16_t* p) {
  HalfVec h;
  memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)
  return Vec(_mm512_slli_epi32(_mm512_cvtepu16_epi32(__m256i(h)), 16));
#elif defined(EQR_USE_AVX2)
  return Vec(_mm256_slli_epi32(_mm256_cvtepu16_epi32(__m128i(h)), 16));
#else
  return bits<Vec>(__builtin_convertvector(h, UVec) << 16);
#endif
}

}  // namespace eqr::cpu::EQR_ISA
