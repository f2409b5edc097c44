// Matrix products in the tile registers of AMX: as `tile` of tile.h, but a step takes 64 bytes of each row of `a`,
// which lie side by side. Up to kAmxRows rows, in two halves, by the two vectors of a panel: four registers of sums,
// and four for the operands.
#pragma once

#include "cpu/kernels/operands.h"

namespace eqr::cpu::EQR_ISA {

constexpr int kAmxRows = 32;
constexpr int kPrefetchLine = 64;
// Cache lines that a step fetches ahead: of the 32 that it takes of a panel a third, since a panel meets three tiles of
// a Sudoku's rows.
constexpr int kAmxPrefetched = 11;

// Where the values of a tile's row i, at its step k, begin: at + i * row + k * step.
template <class T>
struct Strided {
  const T* at;
  int64_t row, step;
};

#if defined(__AMX_TILE__)

// GCC's intrinsics for tiles do not say what memory they read. What was stored before this is there for them.
EQR_INLINE void written() { asm volatile("" ::: "memory"); }

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

// out [rows][2]: `rows` rows of `a` by the two vectors of a panel, of which a step takes 16 rows, of kB values of each
// column. The registers have the shape of `rows` (AmxShape). `prefetch` goes on by prefetch_step at each step.
template <class Op>
__attribute__((noinline)) void amx_tile(int64_t rows, Strided<typename Op::A> a, Strided<typename Op::B> b,
                                        int64_t steps, typename Op::Acc* __restrict out, const char* prefetch,
                                        int64_t prefetch_step = kAmxPrefetched * kPrefetchLine) {
  constexpr int kOutBytes = 2 * 64;
  const int64_t half = rows > 1 ? (rows + 1) / 2 : 0;  // one row alone stands in both halves
  const int64_t row_bytes = a.row * int64_t(sizeof(typename Op::A));
  const int64_t panel_row = b.row * int64_t(sizeof(typename Op::B));
  const int64_t panel_step = b.step * int64_t(sizeof(typename Op::B));
  const typename Op::A *upper = a.at, *lower = a.at + half * a.row;
  const char* panel = reinterpret_cast<const char*>(b.at);
  written();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < steps; ++k) {
    _tile_loadd(6, panel, panel_row);
    _tile_loadd(4, upper, row_bytes);
    _tile_loadd(7, panel + 64, panel_row);
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
    for (int line = 0; line < kAmxPrefetched; ++line) __builtin_prefetch(prefetch + line * kPrefetchLine, 0, 2);
    upper += a.step, lower += a.step, panel += panel_step, prefetch += prefetch_step;
  }
  _tile_stored(0, out, kOutBytes);
  _tile_stored(1, out + 1, kOutBytes);
  _tile_stored(2, out + 2 * half, kOutBytes);
  _tile_stored(3, out + 2 * half + 1, kOutBytes);
}

#else  // the levels without AMX, and a build that emulates it

struct AmxShape {
  void set(int64_t) {}
};

template <class Op>
__attribute__((noinline)) void amx_tile(int64_t rows, Strided<typename Op::A> a, Strided<typename Op::B> b,
                                        int64_t steps, typename Op::Acc* __restrict out, const char*, int64_t = 0) {
  for (int64_t i = 0; i < rows; ++i)
    for (int j = 0; j < 2; ++j) {
      typename Op::Acc total = {};
      for (int64_t step = 0; step < steps; ++step)
        for (int64_t k = 0; k < Op::kDepth; k += Op::kB) {
          const typename Op::A* row = a.at + i * a.row + step * a.step + k;
          const typename Op::B* column = b.at + step * b.step + k / Op::kB * b.row + j * kLanes * Op::kB;
          total = Op::multiply_add(Op::broadcast(row), Op::load_b(column), total);
        }
      out[2 * i + j] = total;
    }
}

#endif

}  // namespace eqr::cpu::EQR_ISA
