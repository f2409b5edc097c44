// What ends a block: u <- RMSnorm over features of (u + SwiGLU(u)), around the sums of the second product that
// the threads hold. The products themselves are in channel_mixer_mma.h and channel_mixer_wgmma.h.
#pragma once

#include "cuda/throughput.h"

namespace eqr::cuda {

// Calls visit(pair, tile, odd) for every four features that a thread owns. Unrolled, for what is in registers.
template <int D, class Visit>
EQR_DEVICE void for_each_quad(Visit visit) {
  EQR_UNROLL
  for (int pair = 0; pair < Sizes<D>::kRows / 2; ++pair) EQR_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) EQR_UNROLL
  for (int odd = 0; odd < 2; ++odd) visit(pair, tile, odd);
}

// One of them: rows g and g + 8 of the two tiles of 64 rows.
template <int D>
EQR_DEVICE Quad quad_of(const Sums<D>& y, int pair, int tile, int odd) {
  const auto &low = y.v[2 * pair][tile], &high = y.v[2 * pair + 1][tile];
  return {{low[odd], low[2 + odd], high[odd], high[2 + odd]}};
}

template <int D>
EQR_DEVICE void set_quad(Sums<D>& y, int pair, int tile, int odd, const Quad& q) {
  auto &low = y.v[2 * pair][tile], &high = y.v[2 * pair + 1][tile];
  low[odd] = q.v[0], low[2 + odd] = q.v[1], high[odd] = q.v[2], high[2 + odd] = q.v[3];
}

// The second product is added to the residual.
template <int D>
EQR_DEVICE void start_channel_mixer(const Lane& l, const Scratch<D>& s, Sums<D>& y) {
  for_each_quad<D>([&](int pair, int tile, int odd) {
    set_quad<D>(y, pair, tile, odd, unpack(*reinterpret_cast<const Two*>(s.operand + l.quad_at<D>(pair, tile, odd))));
  });
}

// silu(gate) * up of 8 hidden units (core `core`) at 8 tokens into the second product's operand. A fragment of the
// first product has the gates in its rows 0-7 and the ups in the others.
template <class Be, int kUnits>
EQR_DEVICE void put_swiglu(char* hidden, const Lane& l, int tile, int core, const float (&c)[4]) {
  EQR_UNROLL
  for (int odd = 0; odd < 2; ++odd)
    *reinterpret_cast<uint16_t*>(hidden + operand_at<kUnits>(tile, l.row(odd), core, l.group)) =
        uint16_t(Be::pack_bf16(swiglu<Be>(c[odd], c[2 + odd]), 0.0f));
}

// Normalises over features. All threads that compute call it together, `sync` is their barrier; nobody reads the
// operand any more when it returns.
template <class Be, int D, class Sync>
EQR_DEVICE void finish_channel_mixer(const Lane& l, Scratch<D>& s, float eps, Sums<D>& y, Sync sync) {
  EQR_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) EQR_UNROLL
  for (int odd = 0; odd < 2; ++odd) {
    float squares = 0;
    EQR_UNROLL
    for (int i = 0; i < Sizes<D>::kRows; ++i)
      squares += y.v[i][tile][odd] * y.v[i][tile][odd] + y.v[i][tile][2 + odd] * y.v[i][tile][2 + odd];
    squares = sum_groups<Be>(squares);
    if (l.group == 0) s.partial[l.warp][l.token(tile, odd)] = squares;
    Be::keep_order();
  }
  sync();
  if (l.thread < kTokens) {
    float squares = 0;
    for (int w = 0; w < Sizes<D>::kWarps; ++w) squares += s.partial[w][l.thread];
    s.scale[l.thread] = Be::rsqrt(squares / float(D) + eps);
  }
  sync();
  EQR_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) EQR_UNROLL
  for (int odd = 0; odd < 2; ++odd) {
    const float scale = s.scale[l.token(tile, odd)];
    EQR_UNROLL
    for (int i = 0; i < Sizes<D>::kRows; ++i) {
      y.v[i][tile][odd] *= scale;
      y.v[i][tile][2 + odd] *= scale;
    }
    if (odd) Be::keep_order();
  }
}

// Of four features: `at` is their place in the operand.
template <class Be, int D>
EQR_DEVICE void store_operand(Scratch<D>& s, int at, const Quad& x) {
  *reinterpret_cast<Two*>(s.operand + at) = pack<Be>(x);
}

}  // namespace eqr::cuda
