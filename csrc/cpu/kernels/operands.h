// What the products of matrices take: an Op says how many values of the summed axis a step takes (kDepth), how many of
// them lie side by side in a panel (kB), and how they are multiplied.
#pragma once

#include "cpu/kernels/simd.h"

namespace eqr::cpu::EQR_ISA {

// fp32 operands
struct F32 {
  typedef float A;
  typedef float B;
  typedef Vec Acc;
  static constexpr int kDepth = 1, kB = 1;
  EQR_INLINE Vec load_b(const float* b) { return load(b); }
  EQR_INLINE Vec broadcast(const float* a) { return splat(*a); }
  EQR_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

// fp32 arithmetic on weights that are stored as bf16: half the memory traffic where there are no bf16 instructions
struct F32Bf16 : F32 {
  typedef uint16_t B;
  EQR_INLINE Vec load_b(const uint16_t* b) { return load_bf16(b); }
};

template <class T>
EQR_INLINE int32_t load_word(const T* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return word;
}

// bf16 pairs, fp32 sums
struct Bf16Dot {
  typedef uint16_t A;
  typedef uint16_t B;
  typedef Vec Acc;
  static constexpr int kDepth = 2, kB = 2;
  EQR_INLINE IVec load_b(const uint16_t* b) { return load_ints(reinterpret_cast<const int32_t*>(b)); }
  EQR_INLINE IVec broadcast(const uint16_t* a) { return splat_int(load_word(a)); }
  EQR_INLINE Vec multiply_add(IVec a, IVec b, Vec c) {
#if defined(__AVX512BF16__)
    return Vec(_mm512_dpbf16_ps(__m512(c), __m512bh(__m512i(a)), __m512bh(__m512i(b))));
#else
    const UVec ua = UVec(a), ub = UVec(b);
    c = fma(bits<Vec>(ua & 0xFFFF0000u), bits<Vec>(ub & 0xFFFF0000u), c);
    return fma(bits<Vec>(ua << 16), bits<Vec>(ub << 16), c);
#endif
  }
};

// a: unsigned bytes, b: signed bytes, exact int32 sums
struct Int8Dot {
  typedef uint8_t A;
  typedef int8_t B;
  typedef IVec Acc;
  static constexpr int kDepth = 4, kB = 4;
  static constexpr int kZeroPoint = 128;  // a is stored as value + 128
  EQR_INLINE IVec load_b(const int8_t* b) { return load_ints(reinterpret_cast<const int32_t*>(b)); }
  EQR_INLINE IVec broadcast(const uint8_t* a) { return splat_int(load_word(a)); }
  EQR_INLINE IVec multiply_add(IVec a, IVec b, IVec c) {
#if defined(__AVX512VNNI__)
    return IVec(_mm512_dpbusd_epi32(__m512i(c), __m512i(a), __m512i(b)));
#else
    for (int shift = 0; shift < 32; shift += 8) c += ((a >> shift) & 0xFF) * ((b << (24 - shift)) >> 24);
    return c;
#endif
  }
};

// 16-bit values, b stored as bytes, exact int32 sums: what there is without VNNI. (The byte products of AVX2 saturate.)
struct Int8Pair {
  typedef int16_t A;
  typedef int8_t B;
  typedef IVec Acc;
  static constexpr int kDepth = 2, kB = 2;
  static constexpr int kZeroPoint = 0;
  EQR_INLINE IVec load_b(const int8_t* b) {
    typedef int8_t Bytes __attribute__((vector_size(2 * kLanes)));
    Bytes bytes;
    memcpy(&bytes, b, sizeof bytes);
#if defined(__AVX512BW__)
    return IVec(_mm512_cvtepi8_epi16(__m256i(bytes)));
#elif defined(EQR_USE_AVX2)
    return IVec(_mm256_cvtepi8_epi16(__m128i(bytes)));
#else
    typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));
    return bits<IVec>(__builtin_convertvector(bytes, Shorts));
#endif
  }
  EQR_INLINE IVec broadcast(const int16_t* a) { return splat_int(load_word(a)); }
  EQR_INLINE IVec multiply_add(IVec a, IVec b, IVec c) {
#if defined(__AVX512BW__)
    return c + IVec(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#elif defined(EQR_USE_AVX2)
    return c + IVec(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#elif EQR_LANES == 4 && defined(__SSE2__)
    return c + IVec(_mm_madd_epi16(__m128i(a), __m128i(b)));
#else
    return c + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
  }
};

// The same in the tile registers of AMX (amx.h), which take 64 bytes of a row at a step.
struct Bf16Amx : Bf16Dot {
  static constexpr int kDepth = 32;
};
struct Int8Amx : Int8Dot {
  static constexpr int kDepth = 64;
};

template <class Op>
constexpr bool kUsesAmx = Op::kDepth > Op::kB;

}  // namespace eqr::cpu::EQR_ISA
