// The throughput regime: a CTA walks one trajectory at a time from start to end and takes the next from a queue. This
// file has what its parts share: who owns what, and where things lie in shared memory.
//
// The channel mixer multiplies weights [features, k] by states [k, tokens], so that 81 tokens pad to 88 and not to 128.
// Each thread then holds, of every pair of 64-row tiles, four features in a row at two tokens of every eight: a float4
// that nobody else touches. States are kept in global memory in just this order, so that no barrier ever guards them.
#pragma once

#include "cuda/elements.h"
#include "cuda/packed.h"
#include "cuda/problem.h"
#include "cuda/trajectory.h"

namespace eqr::cuda {

// D features in groups of 128 threads that compute, each with kRows tiles of 64 rows.
template <int D>
struct Sizes {
  static_assert(D == 128 || D == 256 || D == 512);
  static constexpr int kGroups = D == 128 ? 1 : 2;
  static constexpr int kThreads = 128 * kGroups, kWarps = 4 * kGroups;
  static constexpr int kRows = D / 64 / kGroups;
  static constexpr int kQuads = kRows / 2 * kTiles * 2;  // float4 of a state that a thread owns
  static constexpr int kStateFloats = kQuads * 4 * kThreads;
  static constexpr int kTileBytes = 32 * D > kTokenTileBytes ? 32 * D : kTokenTileBytes / 1024 * 1024 + 1024;
};

// A thread's sums of the channel mixer: [tile of 64 rows][8 tokens][fragment].
template <int D>
struct Sums {
  float v[Sizes<D>::kRows][kTiles][4];
};

// Bytes of an element of an operand [tokens, D], bf16 in cores: in row `row` of 8 tokens, place `in` of 8 features.
// Whole numbers of tiles and cores, for divisions would hide from a compiler that offsets are constants.
template <int D>
EQR_DEVICE int operand_at(int tile, int row, int core, int in) {
  return (tile * (D / 8) + core) * 128 + row * 16 + in * 2;
}

struct Lane {
  unsigned thread, warp, lane, group, place;  // group = lane / 4 and place = lane % 4, of fragments

  template <class Be>
  EQR_DEVICE static Lane of(int first_thread) {
    const unsigned thread = unsigned(Be::thread() - first_thread), lane = thread % 32;
    return {thread, thread / 32, lane, lane / 4, lane % 4};
  }
  // Of the two columns of a fragment that the lane holds.
  EQR_DEVICE int row(int odd) const { return int(place) * 2 + odd; }
  EQR_DEVICE int token(int tile, int odd) const { return tile * 8 + row(odd); }

  // The four features that the thread owns of pair `pair` of tiles; see `dealt`.
  template <int D>
  EQR_DEVICE int first_pair() const {
    return int(warp / 4) * (Sizes<D>::kRows / 2);
  }
  template <int D>
  EQR_DEVICE int feature(int pair) const {
    return (first_pair<D>() + pair) * 128 + int(warp % 4) * 32 + int(group) * 4;
  }
  template <int D>
  EQR_DEVICE int quad_at(int pair, int tile, int odd) const {
    const int core = (first_pair<D>() + pair) * 16 + int(warp % 4) * 4 + int(group / 2);
    return operand_at<D>(tile, row(odd), core, int(group % 2) * 4);
  }
};

EQR_DEVICE float from_bf16(uint32_t low_half) {
  const uint32_t bits = low_half << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

struct alignas(8) Two {
  uint32_t v[2];
};

struct alignas(16) Words {
  uint32_t v[4];
};

EQR_DEVICE Quad unpack(const Two& t) {
  return {{from_bf16(t.v[0] & 0xFFFF), from_bf16(t.v[0] >> 16), from_bf16(t.v[1] & 0xFFFF), from_bf16(t.v[1] >> 16)}};
}

template <class Be>
EQR_DEVICE Two pack(const Quad& q) {
  return {{Be::pack_bf16(q.v[0], q.v[1]), Be::pack_bf16(q.v[2], q.v[3])}};
}

// silu(gate) * up
template <class Be>
EQR_DEVICE float swiglu(float gate, float up) {
  return Be::rough_divide(gate * up, 1.0f + Be::rough_exp(-gate));
}

// Sum over the 8 groups of a warp: the rows of a fragment.
template <class Be>
EQR_DEVICE float sum_groups(float x) {
  x += Be::shuffle_xor(x, 4);
  x += Be::shuffle_xor(x, 8);
  return x + Be::shuffle_xor(x, 16);
}

// Sum over the 4 places of a group: the columns of a fragment.
template <class Be>
EQR_DEVICE float sum_places(float x) {
  x += Be::shuffle_xor(x, 1);
  return x + Be::shuffle_xor(x, 2);
}

// Shared memory besides the ring of weights. Rows of the operand beyond S stay zero.
template <int D>
struct Scratch {
  alignas(128) char operand[kTokensK * D * 2];  // bf16 [96, D] in cores: what the matrix products read
  float partial[Sizes<D>::kWarps][kTokens];     // of a token's sums, a warp each
  float scale[kTokens];                         // of a token; in the heads its change of logits
  float sums[2][Sizes<D>::kWarps][2];           // of the residual: z_L and z_H, change and size
  float bad[Sizes<D>::kWarps];                  // logits that are not finite
  float q_halt;
  uint32_t stay, go;  // whether this CTA has work, and whether any of its cluster has
  Control control;
};

// A trajectory's scratch in global memory. Of the two buffers of a state or of the logits one holds the last outer
// step's, and they take turns.
template <int D>
struct Slot {
  static constexpr int64_t kQuads = Sizes<D>::kQuads * Sizes<D>::kThreads;

  char* base;
  int64_t logits_bytes;  // of one buffer

  EQR_HOST_DEVICE static int64_t padded_logits(const Shape& s) { return whole_lines(s.tokens * s.vocabulary * 4); }
  EQR_HOST_DEVICE static int64_t bytes(const Shape& s, int64_t ring) {
    return 5 * kQuads * 16 + 2 * padded_logits(s) + whole_lines(ring * 4);
  }
  EQR_DEVICE static Slot of(const Problem& p, int64_t number) {
    return {p.slots + number * p.slot_bytes, padded_logits(p.shape)};
  }

  EQR_DEVICE Quad* z_H(int buffer) const { return quads(buffer); }
  EQR_DEVICE Quad* z_L(int buffer) const { return quads(2 + buffer); }
  EQR_DEVICE Quad* u() const { return quads(4); }  // what the blocks made of a module's operand
  EQR_DEVICE float* logits(int buffer) const {     // [S, V]
    return reinterpret_cast<float*>(base + 5 * kQuads * 16 + buffer * logits_bytes);
  }
  EQR_DEVICE float* changes() const { return logits(2); }  // [min(window, depth)]

 private:
  EQR_DEVICE Quad* quads(int which) const { return reinterpret_cast<Quad*>(base) + which * kQuads; }
};

}  // namespace eqr::cuda
