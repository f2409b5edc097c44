// Squares of kLanes by kLanes words, transposed in registers.
#pragma once

#include "cpu/kernels/simd.h"

namespace eqr::cpu::EQR_ISA {

#if defined(__AVX512F__)
// Lanes of a and b that a stage of a transposition puts together, those of b counted from kLanes on.
template <int kGroup, bool kSecond>
struct Exchanged {
  alignas(64) int32_t lanes[kLanes];
  constexpr Exchanged() : lanes() {
    for (int l = 0; l < kLanes; ++l) lanes[l] = l & kGroup ? kLanes + l - (kSecond ? 0 : kGroup) : l + kSecond * kGroup;
  }
};

template <int kGroup>
EQR_INLINE void transpose_stage(UVec (&rows)[kLanes]) {
  static constexpr Exchanged<kGroup, false> first;
  static constexpr Exchanged<kGroup, true> second;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kGroup) continue;
    const __m512i a = __m512i(rows[i]), b = __m512i(rows[i + kGroup]);
    rows[i] = UVec(_mm512_permutex2var_epi32(a, _mm512_load_si512(first.lanes), b));
    rows[i + kGroup] = UVec(_mm512_permutex2var_epi32(a, _mm512_load_si512(second.lanes), b));
  }
}
#endif

EQR_INLINE void transpose(UVec (&rows)[kLanes]) {
#if defined(__AVX512F__)
  transpose_stage<1>(rows), transpose_stage<2>(rows), transpose_stage<4>(rows), transpose_stage<8>(rows);
#else
  for (int i = 0; i < kLanes; ++i)
    for (int l = 0; l < i; ++l) {
      const uint32_t a = rows[i][l];
      rows[i][l] = rows[l][i], rows[l][i] = a;
    }
#endif
}

}  // namespace eqr::cpu::EQR_ISA
