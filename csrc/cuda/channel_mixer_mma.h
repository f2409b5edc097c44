// The channel mixer's products by warps (mma.sync), for every architecture from sm_80 on, and the ring of weights that
// all threads of the CTA fill with cp.async.
#pragma once

#include "cuda/walk.h"
#include "cuda/weights.h"

namespace eqr::cuda {

template <class Be, int D>
struct MmaMachine {
  using Z = Sizes<D>;
  static constexpr int kUnits = 32, kStages = 3, kFirstThread = 0;
  using Tiles = Stream<D, kUnits, false>;
  static constexpr int kWarpsAlong = Z::kWarps / 2;  // along the tokens; two share the hidden units
  static constexpr int kWide = (kTiles + kWarpsAlong - 1) / kWarpsAlong;

  struct Shared {
    alignas(128) char hidden[kTokens * kUnits * 2];  // bf16 [88, units] in cores
    alignas(128) char ring[kStages][Z::kTileBytes];
    Scratch<D> scratch;
  };

  struct Weights {
    Tiles stream;
    Shared& shared;
    int slot = 0;

    EQR_DEVICE void start() {
      for (int i = 0; i + 1 < kStages; ++i) fetch(i);
    }
    // Behind its barrier the tile is there for all, and all have left the slot before it.
    EQR_DEVICE const char* next() {
      Be::template copy_wait<kStages - 2>();
      Be::sync();
      fetch((slot + kStages - 1) % kStages);
      const char* tile = shared.ring[slot];
      slot = (slot + 1) % kStages;
      return tile;
    }
    EQR_DEVICE void release() {}
    EQR_DEVICE void finish() { Be::template copy_wait<0>(); }

   private:
    EQR_DEVICE void fetch(int to) {
      int bytes;
      const char* from = stream.next(&bytes);
      for (int i = Be::thread() * 16; i < bytes; i += Z::kThreads * 16) Be::copy_async(shared.ring[to] + i, from + i);
      Be::copy_commit();
    }
  };

  Weights weights;

  EQR_DEVICE void sync() const { Be::sync(); }
  EQR_DEVICE void sync_operand() const { Be::sync(); }

  EQR_DEVICE void multiply(const Lane& l, Sums<D>& y) {
    const int half = l.warp % 2, along = l.warp / 2, first = along * kTiles / kWarpsAlong;
    const int count = (along + 1) * kTiles / kWarpsAlong - first;
    for (int chunk = 0; chunk < weights.stream.chunks(); ++chunk) {
      float h[2][kWide][4] = {};
      for (int slab = 0; slab < Tiles::kGateUp; ++slab) multiply_up(l, weights.next(), slab, half, first, count, h);
      put_hidden(l, half, first, count, h);
      for (int step = 0; step < Tiles::kDown; ++step) multiply_down(l, weights.next(), step, y);
    }
  }

 private:
  // Rows of four cores for ldmatrix: rows 0-7 and 8-15 of a 16-row tile, then the same for the next eight along k.
  EQR_DEVICE static int fragment_at(const Lane& l, int across) {
    const int matrix = l.lane / 8;
    return (matrix % 2 * across + matrix / 2) * 128 + l.lane % 8 * 16;
  }

  // Two tiles of 16 rows, 8 hidden units each, times `count` tiles of tokens.
  EQR_DEVICE void multiply_up(const Lane& l, const char* tile, int slab, int half, int first, int count,
                              float (&h)[2][kWide][4]) const {
    constexpr int kAcross = Tiles::kSlab / 8;
    const char* a = tile + half * 4 * kAcross * 128 + fragment_at(l, kAcross);
    EQR_UNROLL
    for (int k = 0; k < kAcross; k += 2) {
      uint32_t w[2][4];
      EQR_UNROLL
      for (int i = 0; i < 2; ++i) Be::load_matrices(w[i], a + (i * 2 * kAcross + k) * 128);
      EQR_UNROLL
      for (int j = 0; j < kWide; j += 2)
        if (j < count) {
          uint32_t z[4];
          load_two_tiles(l, weights.shared.scratch.operand + operand_at<D>(first + j, 0, slab * kAcross + k, 0),
                         j + 1 < count ? D / 8 : 0, z);
          EQR_UNROLL
          for (int i = 0; i < 2; ++i) {
            Be::mma(h[i][j], w[i], z[0], z[1]);
            if (j + 1 < kWide && j + 1 < count) Be::mma(h[i][j + 1], w[i], z[2], z[3]);
          }
        }
    }
  }

  // 16 features of 8 tokens, and of the 8 behind them, `next` cores on; again the first where there are none (0).
  EQR_DEVICE static void load_two_tiles(const Lane& l, const char* cores, int next, uint32_t (&z)[4]) {
    Be::load_matrices(z, cores + (int(l.lane / 16) * next) * 128 + l.lane % 16 * 16);
  }

  EQR_DEVICE void put_hidden(const Lane& l, int half, int first, int count, const float (&h)[2][kWide][4]) const {
    EQR_UNROLL
    for (int i = 0; i < 2; ++i) EQR_UNROLL
    for (int j = 0; j < kWide; ++j)
      if (j < count) put_swiglu<Be, kUnits>(weights.shared.hidden, l, first + j, half * 2 + i, h[i][j]);
  }

  EQR_DEVICE void multiply_down(const Lane& l, const char* tile, int step, Sums<D>& y) const {
    uint32_t a[Z::kRows][4];
    EQR_UNROLL
    for (int i = 0; i < Z::kRows; ++i) {
      const int row = (l.warp / 4 * Z::kRows + i) * 64 + l.warp % 4 * 16;
      Be::load_matrices(a[i], tile + row / 8 * 2 * 128 + fragment_at(l, 2));
    }
    EQR_UNROLL
    for (int j = 0; j < kTiles; j += 2) {
      uint32_t h[4];
      load_two_tiles(l, weights.shared.hidden + operand_at<kUnits>(j, 0, step * 2, 0), j + 1 < kTiles ? kUnits / 8 : 0,
                     h);
      EQR_UNROLL
      for (int i = 0; i < Z::kRows; ++i) {
        Be::mma(y.v[i][j], a[i], h[0], h[1]);
        if (j + 1 < kTiles) Be::mma(y.v[i][j + 1], a[i], h[2], h[3]);
      }
    }
  }
};

template <class Be, int D>
EQR_DEVICE void throughput_mma_body(const Problem& p) {
  using Machine = MmaMachine<Be, D>;
  auto& shared = *reinterpret_cast<typename Machine::Shared*>(Be::shared());
  Machine machine{{{p, TokenMixer<Be, D>::kPasses}, shared}};
  const Walk<Be, D, Machine> walk{p, shared.scratch, machine};
  walk.clear_padding();
  if (walk.leader()) shared.scratch.control.live = 0, shared.scratch.control.number = 0;
  machine.weights.start();
  for (;;) {
    walk.ready();
    if (!shared.scratch.control.live) break;
    walk.run();
  }
  machine.weights.finish();
}

}  // namespace eqr::cuda
