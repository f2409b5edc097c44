// One block (token mixing, then channel mixing) forward and backward, for one row of a training batch.
#pragma once

#include "cpu/kernels/training_layout.h"

namespace eqr::cpu::EQR_ISA {

// Rows of a tile. Where there are no bf16 instructions each half of a pair takes registers of its own.
constexpr int kTrainingRows = kHasBf16 ? kRowsOf<TrainingOp> : kLanes == 16 ? 8 : 4;

struct BlockPass {
  const TrainingSizes& z;
  const TrainedLayer& w;
  const Kept& kept;
  const Scratch& s;
  AmxShape& amx;
  int64_t module;
  float norm_eps;
};

// s.u [S][width] <- the block's result; keeps what `block_backward` needs.
void block_forward(const BlockPass&);

// s.g [S][width], the gradient of the block's result <- that of its input; keeps what `block_weights` needs.
void block_backward(const BlockPass&);

// Adds the gradients of the layer's weights, of all modules.
void block_weights(const TrainingSizes&, const Kept&, const Scratch&, AmxShape&, const Gradients&);

// bf16 words: where element pairs [row pair][column] begin
EQR_INLINE int64_t pair_at(int64_t row, int64_t column, int64_t stride) { return row / 2 * stride + 2 * column; }

// a @ b for `rows` rows of a and one panel of b, summed over `pairs` pairs (whole steps of a tile), in tiles: calls
// done(first, count, sums [count][2]). a is rows with a stride of a_stride or, without AMX, kPairs: pairs with one of
// a_stride. `next` is what is read next: it is fetched, as far as each tile's steps go.
template <bool kPairs, class Done>
EQR_INLINE void product(AmxShape& amx, int64_t rows, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                        int64_t b_stride, int64_t pairs, const void* next, Done&& done) {
  static_assert(!kPairs || !kUsesAmx<TrainingOp>, "a tile of AMX takes rows");
  Vec sums[kTrainingRows * 2];
  const Parts tiles = parts_of(rows, kTrainingRows);
  const int64_t steps = pairs / (TrainingOp::kDepth / 2);
  const char* fetch = static_cast<const char*>(next);
  for (int64_t t = 0; t < tiles.parts; ++t, fetch += prefetched_lines<TrainingOp>(steps) * kPrefetchLine) {
    const int64_t first = tiles.begin(t), count = tiles.begin(t + 1) - first;
    panel_tile<TrainingOp, kPairs, kTrainingRows>(amx, count, a + first * (kPairs ? 2 : a_stride), a_stride, b,
                                                  b_stride, steps, sums, fetch);
    done(first, count, sums);
  }
}

}  // namespace eqr::cpu::EQR_ISA
