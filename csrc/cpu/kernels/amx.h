// Matrix products in the tile registers of AMX: as `tile` of tile.h, but a step takes 64 bytes of each row of `a`,
// which lie side by side. Up to kAmxRows rows, in two halves, by the two vectors of a panel: four registers of sums,
// and four for the operands.
#pragma once

#include "cpu/kernels/operands.h"

namespace eqr::cpu::EQR_ISA {

constexpr int kAmxRows = 32;
constexpr int kPrefetchLine = 64;
// Cache lines that a step fetches ahead: of the 32 that it takes of a panel a third, since a Sudoku has three tiles.
constexpr int kAmxPrefetched = 11;

#if defined(__AMX_TILE__)

// GCC's intrinsics for tiles do not say what memory they read. What was stored before this is there for them.
[[gnu::always_inline]] inline void written() { asm volatile("" ::: "memory"); }

// As the processor reads it (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, 18.2: palette 1).
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];  // of a row of each register
  uint8_t rows[16];
};

// The registers' shapes for tiles of some number of rows. To set them takes as long as a fifth of a tile, so they stay
// until another number comes; the registers are given back at the end.
class AmxShape {
 public:
  AmxShape() = default;
  ~AmxShape() {
    if (rows_) _tile_release();
  }
  AmxShape(const AmxShape&) = delete;
  AmxShape& operator=(const AmxShape&) = delete;

  [[gnu::always_inline]] void set(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    const uint8_t first = uint8_t((rows + 1) / 2), second = uint8_t(rows > 1 ? rows / 2 : 1);
    const TileConfig config = {.palette = 1,
                               .start_row = 0,
                               .reserved = {},
                               .bytes = {64, 64, 64, 64, 64, 64, 64, 64},
                               .rows = {first, first, second, second, first, second, 16, 16}};
    written();
    _tile_loadconfig(&config);
  }

 private:
  int64_t rows_ = 0;
};

// Row i of `a` begins at a + i * row_stride, its next step step_stride further on. The registers have the shape of
// `rows` (AmxShape).
template <class Op>
__attribute__((noinline)) void amx_tile(int64_t rows, const typename Op::A* a, int64_t row_stride, int64_t step_stride,
                                        const typename Op::B* b, int64_t steps, typename Op::Acc* __restrict out,
                                        const char* prefetch) {
  constexpr int kRowBytes = 2 * 64;                    // of a panel's two vectors
  const int64_t half = rows > 1 ? (rows + 1) / 2 : 0;  // one row alone stands in both halves
  const int64_t row_bytes = row_stride * int64_t(sizeof(typename Op::A));
  const typename Op::A *upper = a, *lower = a + half * row_stride;
  const char* panel = reinterpret_cast<const char*>(b);
  written();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < steps; ++k) {
    _tile_loadd(6, panel, kRowBytes);
    _tile_loadd(4, upper, row_bytes);
    _tile_loadd(7, panel + 64, kRowBytes);
    _tile_loadd(5, lower, row_bytes);
    if constexpr (sizeof(typename Op::B) == 2) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
    for (int line = 0; line < kAmxPrefetched; ++line, prefetch += kPrefetchLine) __builtin_prefetch(prefetch, 0, 2);
    upper += step_stride, lower += step_stride, panel += 16 * kRowBytes;
  }
  _tile_stored(0, out, kRowBytes);
  _tile_stored(1, out + 1, kRowBytes);
  _tile_stored(2, out + 2 * half, kRowBytes);
  _tile_stored(3, out + 2 * half + 1, kRowBytes);
}

#else  // the levels without AMX, and a build that emulates it

struct AmxShape {
  void set(int64_t) {}
};

template <class Op>
__attribute__((noinline)) void amx_tile(int64_t rows, const typename Op::A* a, int64_t row_stride, int64_t step_stride,
                                        const typename Op::B* b, int64_t steps, typename Op::Acc* __restrict out,
                                        const char*) {
  for (int64_t i = 0; i < rows; ++i)
    for (int j = 0; j < 2; ++j) {
      typename Op::Acc total = {};
      for (int64_t k = 0; k < steps * Op::kDepth; k += Op::kB) {
        const typename Op::A* at = a + i * row_stride + k / Op::kDepth * step_stride + k % Op::kDepth;
        total = Op::multiply_add(Op::broadcast(at), Op::load_b(b + (2 * k / Op::kB + j) * kLanes * Op::kB), total);
      }
      out[2 * i + j] = total;
    }
}

#endif

}  // namespace eqr::cpu::EQR_ISA
