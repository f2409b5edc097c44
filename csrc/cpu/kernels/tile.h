// Matrix products in tiles that stay in registers: up to kTileRows rows by two vectors of columns (a panel).
//   a  the operand that is broadcast: row-major, or (kPacked) with a tile's rows side by side at each step; a_stride
//      goes from row to row or, packed, from step to step
//   b  the operand that is loaded as vectors: a panel, [steps][kPanel][Op::kB]
// An Op says how many values of the summed axis a step takes (kDepth) and what its operands are.
#pragma once

#include "cpu/kernels/simd.h"

namespace eqr::cpu::EQR_ISA {

constexpr int kPanel = 2 * kLanes;  // columns of a panel
// Two vectors of sums for each row must leave registers for the operands, of which SSE2 wants one more for products.
constexpr int kTileRows = kLanes == 16 ? 9 : kLanes == 8 ? 6 : 5;
constexpr int kTileUnits = kLanes == 16 ? 4 : kLanes == 8 ? 3 : 2;  // of a SwiGLU: a gate row and an up row each
constexpr int kPrefetchLine = 64;

// fp32 operands
struct F32 {
  typedef float A;
  typedef float B;
  typedef Vec Acc;
  static constexpr int kDepth = 1, kA = 1, kB = 1;
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
  static constexpr int kDepth = 2, kA = 2, kB = 2;
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
  static constexpr int kDepth = 4, kA = 4, kB = 4;
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
  static constexpr int kDepth = 2, kA = 2, kB = 2;
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

// out[i * out_stride + j] = the sum over the steps for row i and vector j of the panel. Not inlined, and through a
// buffer: GCC spills the sums to the stack inside the loop when it sees what is done with them. `prefetch` walks what
// is needed next.
template <class Op, int kRows, int kColumns, bool kPacked>
__attribute__((noinline)) void tile(const typename Op::A* a, int64_t a_stride, const typename Op::B* b,
                                    int64_t b_stride, int64_t steps, typename Op::Acc* __restrict out,
                                    int64_t out_stride, const char* prefetch) {
  typename Op::Acc c[kRows][kColumns];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) c[i][j] = typename Op::Acc{};
  for (int64_t k = 0; k < steps; ++k) {
    decltype(Op::load_b(b)) column[kColumns];
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) column[j] = Op::load_b(b + j * kLanes * Op::kB);
    if ((k & 3) == 0) {
      __builtin_prefetch(prefetch, 0, 2);
      prefetch += kPrefetchLine;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto row = Op::broadcast(a + i * (kPacked ? Op::kA : a_stride));
#pragma GCC unroll 2
      for (int j = 0; j < kColumns; ++j) c[i][j] = Op::multiply_add(row, column[j], c[i][j]);
    }
    a += kPacked ? a_stride : Op::kA;
    b += b_stride;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) out[i * out_stride + j] = c[i][j];
}

// The tile of `rows` rows, 1..kTileRows.
template <class Op, int kColumns, bool kPacked, int kRows = kTileRows>
EQR_INLINE void tile_of(int64_t rows, const typename Op::A* a, int64_t a_stride, const typename Op::B* b,
                        int64_t b_stride, int64_t steps, typename Op::Acc* out, int64_t out_stride,
                        const char* prefetch) {
  if (rows == kRows)
    return tile<Op, kRows, kColumns, kPacked>(a, a_stride, b, b_stride, steps, out, out_stride, prefetch);
  if constexpr (kRows > 1)
    tile_of<Op, kColumns, kPacked, kRows - 1>(rows, a, a_stride, b, b_stride, steps, out, out_stride, prefetch);
}

// `count` rows or units in as few parts of at most `most` as there must be, of nearly equal size.
struct Parts {
  int64_t count, parts;
  int64_t begin(int64_t part) const { return count * part / parts; }
};
EQR_INLINE Parts parts_of(int64_t count, int64_t most) { return {count, (count + most - 1) / most}; }

// Tiles [begin, end) of one panel of a @ w^T: calls done(first row, rows, sums [rows][2]) for each. `next` is the panel
// that comes next.
template <class Op, bool kPacked, class Done>
EQR_INLINE void panel_product(const typename Op::A* a, int64_t a_stride, const Parts& tiles, int64_t begin, int64_t end,
                              const typename Op::B* panel, int64_t steps, const void* next, Done&& done) {
  typename Op::Acc sums[kTileRows * 2];
  const int64_t bytes = steps * kPanel * Op::kB * int64_t(sizeof(typename Op::B));
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = tiles.begin(t), size = tiles.begin(t + 1) - first;
    const typename Op::A* from = a + first * (kPacked ? steps * Op::kA : a_stride);
    const int64_t ahead = t * ((steps + 3) / 4) * kPrefetchLine;
    const char* prefetch = reinterpret_cast<const char*>(panel);
    if (ahead < bytes) prefetch = static_cast<const char*>(next) + ahead;
    tile_of<Op, 2, kPacked>(size, from, kPacked ? size * Op::kA : a_stride, panel, kPanel * Op::kB, steps, sums, 2,
                            prefetch);
    done(first, size, sums);
  }
}

}  // namespace eqr::cpu::EQR_ISA
