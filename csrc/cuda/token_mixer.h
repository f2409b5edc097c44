// The token mixer's half of a block, in place on the operand: u <- RMSnorm over tokens of (u^T + SwiGLU(u^T)). A warp
// has 16 features at a time, twice, with all their tokens, so that nothing leaves its registers between the two
// products: what the first gives is what the second takes.
#pragma once

#include "cuda/throughput.h"

namespace eqr::cuda {

// y += SwiGLU of a tile's hidden units, for kRows tiles of 16 features whose fragments are in `u`.
template <class Be, int kRows>
EQR_DEVICE void mix_tokens(const Lane& l, const char* tile, const uint32_t (&u)[kRows][kTokenSteps][4],
                           float (&y)[kRows][kTiles][4]) {
  float gate[kRows][2][4] = {}, up[kRows][2][4] = {};
  EQR_UNROLL
  for (int k = 0; k < kTokenSteps; ++k) EQR_UNROLL
  for (int j = 0; j < 2; ++j) {
    const Words w = *reinterpret_cast<const Words*>(tile + (k * 2 + j) * 512 + l.lane * 16);
    EQR_UNROLL
    for (int i = 0; i < kRows; ++i) {
      Be::mma(gate[i][j], u[i][k], w.v[0], w.v[1]);
      Be::mma(up[i][j], u[i][k], w.v[2], w.v[3]);
    }
  }
  uint32_t h[kRows][4];
  EQR_UNROLL
  for (int i = 0; i < kRows; ++i) EQR_UNROLL
  for (int j = 0; j < 2; ++j) EQR_UNROLL
  for (int r = 0; r < 2; ++r)
    h[i][2 * j + r] = Be::pack_bf16(swiglu<Be>(gate[i][j][2 * r], up[i][j][2 * r]),
                                    swiglu<Be>(gate[i][j][2 * r + 1], up[i][j][2 * r + 1]));
  EQR_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    const Two w = *reinterpret_cast<const Two*>(tile + kMixerInBytes + j * 256 + l.lane * 8);
    EQR_UNROLL
    for (int i = 0; i < kRows; ++i) Be::mma(y[i][j], h[i], w.v[0], w.v[1]);
  }
}

template <class Be, int D>
struct TokenMixer {
  using Z = Sizes<D>;
  static constexpr int kRows = 2;  // tiles of 16 features at a time
  static constexpr int kPasses = D / 16 / Z::kWarps / kRows;

  char* operand;
  int tokens;
  float eps;

  // `weights` gives the tiles of packed.h, once for every pass.
  template <class Weights>
  EQR_DEVICE void run(const Lane& l, Weights& weights, int tiles) {
    for (int pass = 0; pass < kPasses; ++pass) {
      const int first = (int(l.warp) * kPasses + pass) * kRows * 16;
      uint32_t u[kRows][kTokenSteps][4];
      EQR_UNROLL
      for (int i = 0; i < kRows; ++i) EQR_UNROLL
      for (int k = 0; k < kTokenSteps; ++k) Be::load_matrices_transposed(u[i][k], core(l, first + 16 * i, 2 * k));
      float y[kRows][kTiles][4] = {};
      for (int tile = 0; tile < tiles; ++tile) {
        mix_tokens<Be, kRows>(l, weights.next(), u, y);
        weights.release();
      }
      EQR_UNROLL
      for (int i = 0; i < kRows; ++i) finish(l, first + 16 * i, y[i]);
    }
  }

 private:
  // The row that lane `l` names of the cores (tokens 8 k.., features f..), (k, f + 8), (k + 1, f), (k + 1, f + 8).
  EQR_DEVICE const char* core(const Lane& l, int feature, int k) const {
    const int matrix = l.lane / 8;
    return operand + operand_at<D>(k + matrix / 2, l.lane % 8, feature / 16 * 2 + matrix % 2, 0);
  }

  // Residual, norm over tokens, and back into the operand, for rows (features) g and g + 8.
  EQR_DEVICE void finish(const Lane& l, int first, float (&y)[kTiles][4]) const {
    EQR_UNROLL
    for (int r = 0; r < 2; ++r) {
      const auto at = [&](int tile, int odd) {
        return reinterpret_cast<uint16_t*>(operand + operand_at<D>(tile, l.row(odd), first / 16 * 2 + r, l.group));
      };
      float squares = 0;
      EQR_UNROLL
      for (int j = 0; j < kTiles; ++j) EQR_UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        float& x = y[j][2 * r + odd];
        x += from_bf16(*at(j, odd));
        squares += x * x;
      }
      const float scale = Be::rsqrt(sum_places<Be>(squares) / float(tokens) + eps);
      EQR_UNROLL
      for (int j = 0; j < kTiles; ++j) EQR_UNROLL
      for (int odd = 0; odd < 2; ++odd) *at(j, odd) = uint16_t(Be::pack_bf16(y[j][2 * r + odd] * scale, 0.0f));
    }
  }
};

}  // namespace eqr::cuda
