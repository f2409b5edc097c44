// The operator in double precision, straight from its definition: row-major, one loop after another, nothing shared
// with the kernels but the random words.
#pragma once

#include <stdint.h>

#include <vector>

#include "cpu/operator.h"

namespace eqr::test {

using Matrix = std::vector<double>;

// An operator that mixes tokens, with a random start and as much damping as the published one.
inline Shape mlp_shape(int64_t S, int64_t d, int64_t V, int64_t layers = 1, int64_t H = 1, int64_t L = 1) {
  return {.tokens = S,
          .features = d,
          .vocabulary = V,
          .mixer_hidden = 256,
          .hidden = 256,
          .heads = 0,
          .layers = layers,
          .H_cycles = H,
          .L_cycles = L,
          .rope_parts = 0,
          .fixed_start = 0,
          .lambda = 0.95f,
          .keep = 0.05f,
          .norm_eps = 1e-5f,
          .H_std = 1.0f,
          .L_std = 1.0f};
}

// Weights of a shape, drawn at random: linear layers of standard deviation 1 / sqrt(fan-in).
struct RandomModel {
  RandomModel(const Shape&, uint64_t seed);

  Shape shape;
  std::vector<float> embedding, lm_head, q_weight, q_bias, cos, sin, H_start, L_start;
  std::vector<std::vector<float>> matrices;  // 4 a layer
  std::vector<BlockWeights> blocks;
  OperatorWeights weights() const;
};

struct OracleState {
  Matrix z_H, z_L;  // [S, d]
  // of the last outer step
  Matrix logits;  // [S, V]
  double q_halt = 0, change_sq = 0, size_sq = 0;
};

OracleState oracle_start(const RandomModel&, const cpu::StepInput&);
void oracle_outer_step(const RandomModel&, const cpu::StepInput&, OracleState&);

}  // namespace eqr::test
