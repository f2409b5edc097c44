// Matrix products in tiles that stay in registers: up to kRowsOf<Op> rows by two vectors of columns (a panel).
//   a  the operand that is broadcast: row-major, or (kPacked) with a tile's rows side by side at each step; a_stride
//      goes from row to row or, packed, from step to step
//   b  the operand that is loaded as vectors: a panel, [depth / Op::kB][kPanel][Op::kB]
#pragma once

#include "cpu/kernels/amx.h"

namespace eqr::cpu::EQR_ISA {

constexpr int kPanel = 2 * kLanes;  // columns of a panel
// Two vectors of sums for each row must leave registers for the operands, of which SSE2 wants one more for products.
constexpr int kTileRows = kLanes == 16 ? 9 : kLanes == 8 ? 6 : 5;
constexpr int kTileUnits = kLanes == 16 ? 4 : kLanes == 8 ? 3 : 2;  // of a SwiGLU: a gate row and an up row each

template <class Op>
constexpr int kRowsOf = kUsesAmx<Op> ? kAmxRows : kTileRows;
template <class Op>
constexpr int kUnitsOf = kUsesAmx<Op> ? kAmxRows / 2 : kTileUnits;

// out[i * out_stride + j] = the sum over the steps for row i and vector j of the panel. Not inlined, and through a
// buffer: GCC spills the sums to the stack inside the loop when it sees what is done with them. `prefetch` walks what
// is needed next.
template <class Op, int kRows, int kColumns, bool kPacked>
__attribute__((noinline)) void tile(const typename Op::A* a, int64_t a_stride, const typename Op::B* b,
                                    int64_t b_stride, int64_t steps, typename Op::Acc* __restrict out,
                                    int64_t out_stride, const char* prefetch) {
  static_assert(!kUsesAmx<Op>);
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
      const auto row = Op::broadcast(a + i * (kPacked ? Op::kDepth : a_stride));
#pragma GCC unroll 2
      for (int j = 0; j < kColumns; ++j) c[i][j] = Op::multiply_add(row, column[j], c[i][j]);
    }
    a += kPacked ? a_stride : Op::kDepth;
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

// Cache lines that a tile of `steps` steps fetches ahead.
template <class Op>
EQR_INLINE int64_t prefetched_lines(int64_t steps) {
  return kUsesAmx<Op> ? steps * kAmxPrefetched : (steps + 3) / 4;
}

// The tile of `rows` rows, 1..kRows, by a panel, whose rows of kPanel columns lie b_stride apart: out [rows][2].
template <class Op, bool kPacked, int kRows = kRowsOf<Op>>
EQR_INLINE void panel_tile(AmxShape& shape, int64_t rows, const typename Op::A* a, int64_t a_stride,
                           const typename Op::B* panel, int64_t b_stride, int64_t steps, typename Op::Acc* out,
                           const char* prefetch) {
  if constexpr (kUsesAmx<Op>) {
    shape.set(rows);
    amx_tile<Op>(rows, {a, kPacked ? Op::kDepth : a_stride, kPacked ? a_stride : Op::kDepth},
                 {panel, b_stride, Op::kDepth / Op::kB * b_stride}, steps, out, prefetch);
  } else {
    tile_of<Op, 2, kPacked, kRows>(rows, a, a_stride, panel, b_stride, steps, out, 2, prefetch);
  }
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
EQR_INLINE void panel_product(AmxShape& shape, const typename Op::A* a, int64_t a_stride, const Parts& tiles,
                              int64_t begin, int64_t end, const typename Op::B* panel, int64_t steps, const void* next,
                              Done&& done) {
  typename Op::Acc sums[kRowsOf<Op> * 2];
  const int64_t bytes = steps * kPanel * Op::kDepth * int64_t(sizeof(typename Op::B));
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = tiles.begin(t), size = tiles.begin(t + 1) - first;
    const typename Op::A* from = a + first * (kPacked ? steps * Op::kDepth : a_stride);
    const int64_t ahead = t * prefetched_lines<Op>(steps) * kPrefetchLine;
    const char* prefetch = reinterpret_cast<const char*>(panel);
    if (ahead < bytes) prefetch = static_cast<const char*>(next) + ahead;
    panel_tile<Op, kPacked>(shape, size, from, kPacked ? size * Op::kDepth : a_stride, panel, kPanel * Op::kB, steps,
                            sums, prefetch);
    done(first, size, sums);
  }
}

}  // namespace eqr::cpu::EQR_ISA
