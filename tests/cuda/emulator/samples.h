// Small programs as bodies, right ones and the same with one mistake.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bf16.h"
#include "emulator.h"

namespace eqr::emu {

constexpr int kSeeds = 10;

enum class Mistake {
  kNone,
  // of `Product`
  kNoSync,
  kNoSyncBeforeReuse,
  kNoCopyWait,
  // of `Ring`
  kNoFence,
  kNoFenceOfRegisters,
  kReadBeforeWait,
  kStoreBeforeWait,
  kHoldBeforeWait,
  kWrongStride,
  kSwizzle,
  kWrongParity,
  kNoEmptyWait,
  kTooFewBytes,
  kTooManyArrivals,
  kNoInitDone,
  kNoClusterSync,
  kLeavesEarly,
  kWarpsDiffer,
};

inline std::vector<uint16_t> random_bf16(size_t n, uint32_t seed) {
  std::vector<uint16_t> out(n);
  for (uint16_t& x : out) {
    seed = seed * 1664525 + 1013904223;
    x = to_bf16(float(int(seed >> 16) % 65) / 32 - 1);
  }
  return out;
}

// c [32, 32] = a [32, k] b [k, 32] by two warps: `copy_async` into two buffers in turn, `load_matrices`, `mma`.
struct Product {
  static constexpr int kSize = 32, kStep = 16, kShared = 2 * 2 * kSize * kStep * 2;
  int k = 96;
  std::vector<uint16_t> a = random_bf16(size_t(kSize) * k, 1), b = random_bf16(size_t(k) * kSize, 2);
  std::vector<float> c = std::vector<float>(kSize * kSize);

  template <class Be>
  void body(Mistake mistake) {
    auto* tiles = reinterpret_cast<uint16_t*>(Be::shared());
    const int thread = Be::thread(), warp = thread / 32, lane = thread % 32;
    const auto tile_a = [&](int step) { return tiles + step % 2 * 2 * kSize * kStep; };  // [32, 16]
    const auto tile_b = [&](int step) { return tile_a(step) + kSize * kStep; };          // [16, 32]
    const auto fetch = [&](int step) {
      if (step * kStep < k) {
        const int row = thread / 2, column = thread % 2 * 8;
        Be::copy_async(tile_a(step) + row * kStep + column, &a[size_t(row) * k + step * kStep + column]);
        const int depth = thread / 4, n = thread % 4 * 8;
        Be::copy_async(tile_b(step) + depth * kSize + n, &b[size_t(step * kStep + depth) * kSize + n]);
      }
      Be::copy_commit();
    };
    float sums[4][4] = {};
    fetch(0);
    for (int step = 0; step * kStep < k; ++step) {
      fetch(step + 1);
      if (mistake != Mistake::kNoCopyWait) Be::template copy_wait<1>();
      if (mistake != Mistake::kNoSync) Be::sync();
      const int down = lane % 16, right = lane / 16 * 8;
      uint32_t of_a[4];
      Be::load_matrices(of_a, tile_a(step) + (16 * warp + down) * kStep + right);
      for (int n = 0; n < kSize; n += 16) {
        uint32_t of_b[4];
        Be::load_matrices_transposed(of_b, tile_b(step) + down * kSize + n + right);
        Be::mma(sums[n / 8], of_a, of_b[0], of_b[1]);
        Be::mma(sums[n / 8 + 1], of_a, of_b[2], of_b[3]);
      }
      if (mistake != Mistake::kNoSyncBeforeReuse) Be::sync();
    }
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < 4; ++i)
        c[size_t(16 * warp + lane / 4 + i / 2 * 8) * kSize + 8 * j + lane % 4 * 2 + i % 2] = sums[j][i];
  }

  void run(Mistake mistake, int seed) {
    launch({.threads = 64, .shared_bytes = kShared, .seed = uint64_t(seed)}, [&] { body<Emulated>(mistake); });
  }

  int wrong() const {  // elements
    int count = 0;
    for (int row = 0; row < kSize; ++row)
      for (int column = 0; column < kSize; ++column) {
        float sum = 0;
        for (int i = 0; i < k; ++i) sum += from_bf16(a[size_t(row) * k + i]) * from_bf16(b[size_t(i) * kSize + column]);
        count += !(c[size_t(row) * kSize + column] == sum);  // exact: multiples of 2^-10 below 2^7
      }
    return count;
  }
};

// c [64 a CTA, 40] = a [64 a CTA, k] b [40, k]^T by clusters of two: a is stored by its threads, b comes through a ring
// of two buffers, each CTA fetching half of every piece for both. In core matrices: [k / 8][rows / 8][8][8].
struct Ring {
  static constexpr int kPiece = 32, kRows = 64, kColumns = 40, kConsumers = 128, kThreads = kConsumers + 32;
  static constexpr int kStages = 2, kBytes = kPiece * kColumns * 2;
  int ctas = 4, k = 224;
  int bytes_of_a() const { return kRows * k * 2; }
  int shared_bytes() const { return bytes_of_a() + kStages * kBytes + 64; }
  std::vector<uint16_t> a = random_bf16(size_t(ctas) * kRows * k, 3), b = random_bf16(size_t(kColumns) * k, 4);
  std::vector<float> c = std::vector<float>(size_t(ctas) * kRows * kColumns);

  static size_t packed(int rows, int row, int k) {
    return size_t(k / 8 * rows / 8 + row / 8) * 64 + row % 8 * 8 + k % 8;
  }

  template <class Be>
  uint64_t descriptor(const void* p, int along_k, int along_rows) {
    return uint64_t(Be::shared_address(p) >> 4) | uint64_t(along_k >> 4) << 16 | uint64_t(along_rows >> 4) << 32;
  }

  template <class Be>
  void body(Mistake mistake) {
    char* shared = Be::shared();
    auto* tile_a = reinterpret_cast<uint16_t*>(shared);
    const auto tile_b = [&](int piece) { return shared + bytes_of_a() + piece % kStages * kBytes; };
    auto* full = reinterpret_cast<uint64_t*>(shared + bytes_of_a() + kStages * kBytes);
    uint64_t* empty = full + kStages;
    const int thread = Be::thread(), rank = Be::cluster_rank(), pieces = k / kPiece;
    if (thread == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        Be::barrier_init(full + stage, 1);
        Be::barrier_init(empty + stage, 2 * kConsumers / 32 - (mistake == Mistake::kTooManyArrivals));
      }
      if (mistake != Mistake::kNoInitDone) Be::barrier_init_done();
    }
    if (mistake == Mistake::kNoClusterSync) {
      Be::sync();
    } else {
      Be::cluster_sync();
    }
    if (thread >= kConsumers) {
      for (int piece = 0; thread == kConsumers && piece < pieces; ++piece) {
        const int stage = piece % kStages, round = piece / kStages;
        if (round && mistake != Mistake::kNoEmptyWait) Be::barrier_wait(empty + stage, (round - 1) & 1);
        Be::barrier_arrive_expect(full + stage, mistake == Mistake::kTooFewBytes ? kBytes / 2 : kBytes);
        const int half = kBytes / 2 * rank;
        Be::copy_bulk(tile_b(piece) + half, reinterpret_cast<const char*>(b.data()) + piece * kBytes + half, kBytes / 2,
                      full + stage, 3);
      }
      Be::sync_warp();
    } else {
      consume<Be>(mistake, tile_a, tile_b, full, empty, pieces);
    }
    if (mistake != Mistake::kLeavesEarly) Be::cluster_sync();
  }

  template <class Be, class Tile>
  void consume(Mistake mistake, uint16_t* tile_a, const Tile& tile_b, uint64_t* full, uint64_t* empty, int pieces) {
    const int thread = Be::thread(), warp = thread / 32, lane = thread % 32;
    for (int i = thread; i < kRows * k; i += kConsumers)
      tile_a[packed(kRows, i / k, i % k)] = a[size_t(Be::cta() * kRows + i / k) * k + i % k];
    if (mistake != Mistake::kNoFence) Be::async_fence();
    Be::sync_some(1, kConsumers);
    Be::template more_registers<40>();
    float sums[kColumns / 8][4] = {};
    Be::hold(sums);
    for (int piece = 0; piece < pieces; ++piece) {
      const int stage = piece % kStages;
      Be::barrier_wait(full + stage, (piece / kStages + (mistake == Mistake::kWrongParity)) & 1);
      if (mistake != Mistake::kNoFenceOfRegisters) Be::wgmma_fence();
      for (int step = 0; step < kPiece; step += 16) {
        const char* from_b = tile_b(piece) + packed(kColumns, 0, step) * 2;
        const uint64_t of_a = descriptor<Be>(tile_a + packed(kRows, 0, piece * kPiece + step), kRows * 16, 128);
        const int along_k = mistake == Mistake::kWrongStride ? kRows * 16 : kColumns * 16;
        const uint64_t of_b = descriptor<Be>(from_b, along_k, 128);
        const uint64_t swizzle = mistake == Mistake::kSwizzle ? uint64_t(1) << 62 : 0;
        if (mistake == Mistake::kWarpsDiffer && warp == 3 && piece == 1) Be::wgmma_commit();
        Be::template wgmma<kColumns>(sums, of_a, of_b | swizzle);
      }
      Be::wgmma_commit();
      if (mistake == Mistake::kReadBeforeWait && piece == pieces - 1) break;
      if (mistake == Mistake::kStoreBeforeWait) sums[0][0] = 0;
      if (mistake == Mistake::kHoldBeforeWait) Be::hold(sums);
      Be::template wgmma_wait<0>();
      Be::hold(sums);
      if (lane == 0)
        for (int rank = 0; rank < 2; ++rank) Be::barrier_arrive(empty + stage, rank);
      Be::sync_warp();
    }
    for (int i = 0; i < kColumns / 2; ++i) {
      const int row = 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      c[size_t(Be::cta() * kRows + row) * kColumns + column] = sums[i / 4][i % 4];
    }
    if (mistake == Mistake::kReadBeforeWait) Be::template wgmma_wait<0>();
  }

  void run(Mistake mistake, int seed) {
    std::vector<uint16_t> plain = b;
    for (int row = 0; row < kColumns; ++row)
      for (int i = 0; i < k; ++i) b[packed(kColumns, row, i)] = plain[size_t(row) * k + i];
    launch({.ctas = ctas,
            .threads = kThreads,
            .cluster = 2,
            .resident = 2,
            .shared_bytes = shared_bytes(),
            .seed = uint64_t(seed)},
           [&] { body<Emulated>(mistake); });
    b = plain;
  }

  int wrong() const {
    int count = 0;
    for (int row = 0; row < ctas * kRows; ++row)
      for (int column = 0; column < kColumns; ++column) {
        float sum = 0;
        for (int i = 0; i < k; ++i) sum += from_bf16(a[size_t(row) * k + i]) * from_bf16(b[size_t(column) * k + i]);
        count += !(c[size_t(row) * kColumns + column] == sum);
      }
    return count;
  }
};

}  // namespace eqr::emu
