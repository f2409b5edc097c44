// The channel mixer's products by warpgroups (wgmma, sm_90a). One more warpgroup fetches the weights with bulk copies;
// the CTAs of a cluster fetch a part of every tile each, for all of them.
#pragma once

#include "cuda/walk.h"
#include "cuda/weights.h"

namespace eqr::cuda {

// An operand [rows, k] in cores: `across` of them lie side by side along k.
template <class Be>
EQR_DEVICE uint64_t descriptor(const char* cores, int across) {
  constexpr uint64_t kAlongK = 128 >> 4;
  const uint64_t start = (Be::shared_address(cores) & 0x3FFFF) >> 4, along_rows = uint64_t(across) * 128 >> 4;
  return start | kAlongK << 16 | along_rows << 32;
}

// A place in the ring, and how often it has come round.
template <int kStages>
struct Turn {
  int slot = 0;
  uint32_t parity = 0;

  EQR_DEVICE void advance() {
    if (++slot == kStages) slot = 0, parity ^= 1;
  }
};

template <class Be, int D>
struct WgmmaMachine {
  using Z = Sizes<D>;
  static constexpr int kUnits = 32, kStages = 6, kFirstThread = 128, kComputeBarrier = 1;
  using Tiles = Stream<D, kUnits, true>;

  struct Shared {
    alignas(128) char hidden[2][kTokens * kUnits * 2];  // bf16 [88, units] in cores
    alignas(128) char ring[kStages][Z::kTileBytes];
    uint64_t full[kStages], empty[kStages];
    Scratch<D> scratch;
  };

  struct Weights {
    Shared& shared;
    int ranks;
    Turn<kStages> head = {}, tail = {};

    EQR_DEVICE const char* next() {
      const int slot = head.slot;
      Be::barrier_wait(&shared.full[slot], head.parity);
      head.advance();
      return shared.ring[slot];
    }
    // The oldest tile that this warp has not released.
    EQR_DEVICE void release() {
      Be::sync_warp();
      if (const int lane = Be::thread() % 32; lane < ranks) Be::barrier_arrive(&shared.empty[tail.slot], lane);
      tail.advance();
    }
  };

  Weights weights;
  int chunks;

  EQR_DEVICE void sync() const { Be::sync_some(kComputeBarrier, Z::kThreads); }
  EQR_DEVICE void sync_operand() const {
    Be::async_fence();
    sync();
  }

  // While the tensor cores are at the second product of a chunk, the threads take the SwiGLU of the next one. (Without
  // conditions around products under way, for which ptxas would wait for each by itself.)
  EQR_DEVICE void multiply(const Lane& l, Sums<D>& y) {
    {
      float h[kWide][4] = {};
      multiply_up(l, h);
      Be::template wgmma_wait<0>();
      Be::hold(h);
      weights.release();
      put_hidden(l, 0, h);
      sync_operand();
    }
    for (int chunk = 1; chunk < chunks; ++chunk) {
      float h[kWide][4] = {};
      multiply_up(l, h);
      multiply_down(l, (chunk - 1) % 2, y);
      Be::template wgmma_wait<1>();
      Be::hold(h);
      weights.release();
      put_hidden(l, chunk % 2, h);
      finish_down(y);
      sync_operand();
    }
    multiply_down(l, (chunks - 1) % 2, y);
    finish_down(y);
  }

 private:
  // The first product has one tile of 64 rows a chunk. Two warpgroups share its tokens: 48 each, of which 8 are in
  // both, for more sums than these would not fit beside the second product's.
  static constexpr int kTileCores = 64 / 8 * 2;  // of 64 rows of the second product's weights
  static constexpr uint64_t kCore = 128 >> 4;    // in a descriptor
  static constexpr int kWide = Z::kGroups == 1 ? kTiles : 6;

  EQR_DEVICE static int first_tile(const Lane& l) { return int(l.warp / 4) * (kTiles - kWide); }

  EQR_DEVICE static void hold(Sums<D>& y) {
    EQR_UNROLL
    for (int i = 0; i < Z::kRows; ++i) Be::hold(y.v[i]);
  }

  // Leaves the last tile's product under way, and the tile unreleased.
  EQR_DEVICE void multiply_up(const Lane& l, float (&h)[kWide][4]) {
    Be::hold(h);
    multiply_slab(l, 0, h);
    EQR_NO_UNROLL
    for (int slab = 1; slab < Tiles::kGateUp; ++slab) {
      multiply_slab(l, slab, h);
      Be::template wgmma_wait<1>();
      weights.release();
    }
  }

  EQR_DEVICE void multiply_slab(const Lane& l, int slab, float (&h)[kWide][4]) {
    constexpr int kAcross = Tiles::kSlab / 8;
    const char* operand = weights.shared.scratch.operand + operand_at<D>(first_tile(l), 0, slab * kAcross, 0);
    const char* tile = weights.next();
    Be::wgmma_fence();
    const uint64_t w = Be::opaque(descriptor<Be>(tile, kAcross)), z = Be::opaque(descriptor<Be>(operand, D / 8));
    EQR_UNROLL
    for (int k = 0; k < kAcross; k += 2) Be::template wgmma<kWide * 8>(h, w + k * kCore, z + k * kCore);
    Be::wgmma_commit();
  }

  EQR_DEVICE void multiply_down(const Lane& l, int buffer, Sums<D>& y) {
    hold(y);
    Be::wgmma_fence();
    EQR_NO_UNROLL
    for (int step = 0; step < Tiles::kDown; ++step) {
      const char* tile = weights.next() + l.warp / 4 * Z::kRows * kTileCores * 128;
      const char* hidden = weights.shared.hidden[buffer] + step * 2 * 128;
      const uint64_t w = Be::opaque(descriptor<Be>(tile, 2)), h = Be::opaque(descriptor<Be>(hidden, kUnits / 8));
      EQR_UNROLL
      for (int i = 0; i < Z::kRows; ++i) Be::template wgmma<kTokens>(y.v[i], w + i * kTileCores * kCore, h);
    }
    Be::wgmma_commit();
  }

  EQR_DEVICE void finish_down(Sums<D>& y) {
    Be::template wgmma_wait<0>();
    hold(y);
    for (int step = 0; step < Tiles::kDown; ++step) weights.release();
  }

  EQR_DEVICE void put_hidden(const Lane& l, int buffer, const float (&h)[kWide][4]) const {
    EQR_UNROLL
    for (int j = 0; j < kWide; ++j)
      if (j >= 2 * kWide - kTiles || l.warp < 4)  // what is in both comes from the first
        put_swiglu<Be, kUnits>(weights.shared.hidden[buffer], l, first_tile(l) + j, int(l.warp % 4), h[j]);
  }
};

template <class Be, int D>
struct ThroughputWgmma {
  using Machine = WgmmaMachine<Be, D>;
  using Tiles = typename Machine::Tiles;
  static constexpr int kThreads = Machine::kFirstThread + Sizes<D>::kThreads;

  const Problem& p;
  typename Machine::Shared& shared = *reinterpret_cast<typename Machine::Shared*>(Be::shared());
  const int rank = Be::cluster_rank(), ranks = Be::cluster_size();
  Tiles stream = {p, TokenMixer<Be, D>::kPasses};
  const int tiles =
      int(p.shape.H_cycles * (p.shape.L_cycles + 1) * p.shape.layers) * stream.layer_tiles();  // of an outer step

  EQR_DEVICE void run() {
    if (Be::thread() == 0) {
      for (int i = 0; i < Machine::kStages; ++i) {
        Be::barrier_init(&shared.full[i], 1);
        Be::barrier_init(&shared.empty[i], Sizes<D>::kWarps * ranks);
      }
      Be::barrier_init_done();
      shared.scratch.control.live = 0, shared.scratch.control.number = 0;
    }
    Be::cluster_sync();
    if (Be::thread() < Machine::kFirstThread) {
      Be::template fewer_registers<40>();
      produce();
    } else {
      Be::template more_registers<232>();
      compute();
    }
  }

 private:
  // All CTAs of a cluster go through the weights together, so that one without a trajectory stays as long as another
  // has one. Called by all of their threads.
  EQR_DEVICE bool go_on(bool leader) const {
    Scratch<D>& s = shared.scratch;
    if (leader) s.stay = uint32_t(s.control.live);
    Be::cluster_sync();
    if (leader) {
      s.go = 0;
      for (int r = 0; r < ranks; ++r) s.go |= Be::cluster_load(&s.stay, r);
    }
    Be::cluster_sync();
    return s.go != 0;
  }

  EQR_DEVICE void produce() {
    Turn<Machine::kStages> turn;
    const uint32_t everyone = (1u << ranks) - 1;
    while (go_on(false)) {
      if (Be::thread() == 0)
        for (int i = 0; i < tiles; ++i) {
          int bytes;
          const char* from = stream.next(&bytes);
          const int share = bytes / ranks;
          // A barrier's phase before the first counts as over.
          Be::barrier_wait(&shared.empty[turn.slot], turn.parity ^ 1);
          Be::barrier_arrive_expect(&shared.full[turn.slot], bytes);
          Be::copy_bulk(shared.ring[turn.slot] + rank * share, from + rank * share, share, &shared.full[turn.slot],
                        everyone);
          turn.advance();
        }
      Be::sync_warp();
    }
  }

  EQR_DEVICE void compute() {
    Machine machine{{shared, ranks}, stream.chunks()};
    const Walk<Be, D, Machine> walk{p, shared.scratch, machine};
    walk.clear_padding();
    for (;;) {
      walk.ready();
      if (!go_on(walk.leader())) break;
      if (shared.scratch.control.live)
        walk.run();
      else
        for (int i = 0; i < tiles; ++i) {
          machine.weights.next();
          machine.weights.release();
        }
    }
  }
};

}  // namespace eqr::cuda
