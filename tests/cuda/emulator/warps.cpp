// What the lanes of a warp do together.
#include <cstring>

#include "bf16.h"
#include "machine.h"

namespace eqr::emu {
namespace {

constexpr Kind kSyncWarp{"sync_warp", 0}, kShuffle{"shuffle_xor", 1}, kMma{"mma", 0};
constexpr Kind kLoadMatrices{"load_matrices", 0}, kLoadTransposed{"load_matrices_transposed", 0};

void wake_all(Warp& warp) { machine->wake(warp, warp.met); }

struct Shuffled {
  float value, result;
};

struct Matrices {
  const void* row;
  uint32_t* out;
};

struct Fragments {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

// PTX ISA, "Warp-level matrix load instruction: ldmatrix": of each 8x8 matrix, thread l holds of row l / 4 (with
// .trans, of column l / 4) the elements 2 (l % 4) and the one behind.
template <bool transposed>
void load_all(Warp& warp) {
  for (int lane = 0; lane < kLanes && races::kOn; ++lane) {
    const char* row = static_cast<const char*>(static_cast<const Matrices*>(warp.arguments[lane])->row);
    races::access(*warp.cta->threads[warp.index * kLanes + lane], *warp.cta, uint32_t(row - warp.cta->shared), 16,
                  races::How::kLoad);
  }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        const int row = transposed ? lane % 4 * 2 + e : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + e;
        const auto* from = static_cast<const Matrices*>(warp.arguments[8 * i + row]);
        std::memcpy(&pair[e], static_cast<const char*>(from->row) + 2 * column, 2);
      }
      static_cast<Matrices*>(warp.arguments[lane])->out[i] = uint32_t(pair[0]) | uint32_t(pair[1]) << 16;
    }
  wake_all(warp);
}

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type", with g = lane / 4 and t = lane % 4: a0..a7 in
// rows g (a2, a3, a6, a7: g + 8), columns 2 t + i % 2 (from a4: + 8); b0..b3 in rows 2 t + i % 2 (from b2: + 8), column
// g; c0..c3 in rows g (from c2: g + 8), columns 2 t + i % 2.
void multiply_all(Warp& warp) {
  float a[16][16], b[16][8], c[16][8];
  const auto of = [&](int lane) -> Fragments& { return *static_cast<Fragments*>(warp.arguments[lane]); };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const Fragments& mine = of(lane);
    for (int i = 0; i < 8; ++i) a[g + (i / 2 % 2) * 8][2 * t + i % 2 + i / 4 * 8] = half_of(mine.a[i / 2], i % 2);
    for (int i = 0; i < 4; ++i) b[2 * t + i % 2 + i / 2 * 8][g] = half_of(mine.b[i / 2], i % 2);
    for (int i = 0; i < 4; ++i) c[g + i / 2 * 8][2 * t + i % 2] = mine.c[i];
  }
  for (int row = 0; row < 16; ++row) {
    float sum[8] = {};
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) sum[n] += a[row][k] * b[k][n];
    for (int n = 0; n < 8; ++n) c[row][n] += sum[n];
  }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) of(lane).c[i] = c[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
  wake_all(warp);
}

void check_row(const void* row) {
  if (machine->offset_of(*machine->current->cta, row, 16, "a row of load_matrices") % 16)
    fail("gives load_matrices a row that is not at a multiple of 16 bytes");
}

}  // namespace

void Emulated::sync_warp() {
  machine->meet({&kSyncWarp}, nullptr, [](Warp& warp) {
    races::meet({{&warp, warp.met}});
    wake_all(warp);
  });
}

float Emulated::shuffle_xor(float value, int mask) {
  if (mask < 0 || mask >= kLanes) fail("does shuffle_xor(" + std::to_string(mask) + ")");
  Shuffled mine{value, 0};
  machine->meet({&kShuffle, {mask}}, &mine, [](Warp& warp) {
    for (int lane = 0; lane < kLanes; ++lane)
      static_cast<Shuffled*>(warp.arguments[lane])->result =
          static_cast<Shuffled*>(warp.arguments[lane ^ int(warp.at.numbers[0])])->value;
    wake_all(warp);
  });
  return mine.result;
}

void Emulated::load_matrices(uint32_t (&out)[4], const void* row) {
  check_row(row);
  Matrices mine{row, out};
  machine->meet({&kLoadMatrices}, &mine, load_all<false>);
}

void Emulated::load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  check_row(row);
  Matrices mine{row, out};
  machine->meet({&kLoadTransposed}, &mine, load_all<true>);
}

void Emulated::mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Fragments mine{c, a, {b0, b1}};
  machine->meet({&kMma}, &mine, multiply_all);
}

}  // namespace eqr::emu
