// The operator of an Equilibrium Reasoner as every backend takes it: its sizes and its weights.
// S tokens, d features, V vocabulary, k hidden units.
#pragma once

#include <stdint.h>

#include "common/precision.h"

namespace eqr {

struct Shape {
  int64_t tokens, features, vocabulary;
  int64_t mixer_hidden;  // k(S) of the token SwiGLU; 0 with attention
  int64_t hidden;        // k(d); a multiple of 256, as mixer_hidden
  int64_t heads;         // of the attention; 0 with the token SwiGLU
  int64_t layers, H_cycles, L_cycles;
  int64_t rope_parts;            // 0: no rotary embedding; 1: a head rotates as a whole; 2: each half by itself
  int64_t fixed_start;           // 0: random start states; 1: OperatorWeights::H_start and L_start
  float lambda, keep, norm_eps;  // keep = 1 - lambda
  float H_std, L_std;            // of the random start states
};

struct BlockWeights {
  const float* mixer_in;   // [2 k(S), S] gate rows first; or [3 d, d]: q heads, k heads, v heads
  const float* mixer_out;  // [S, k(S)]; or [d, d]
  const float* gate_up;    // [2 k(d), d] gate rows first
  const float* down;       // [d, k(d)]
};

struct OperatorWeights {
  const float* embedding;          // [V, d]
  const float* lm_head;            // [V, d]
  const float* q_weight;           // [2, d]
  const float* q_bias;             // [2]
  const BlockWeights* blocks;      // [layers]
  const float *cos, *sin;          // [S, d / heads], or null without Shape::rope_parts
  const float *H_start, *L_start;  // [d], the same for every token; or null without Shape::fixed_start
};

}  // namespace eqr
