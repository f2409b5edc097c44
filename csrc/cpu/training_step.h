// A training step's outer step of one row: its last latent recursion forward and backward in bf16 (bf16 operands, fp32
// sums and states), the heads, and the objective or the gradients of another. S tokens, d features, V vocabulary.
#pragma once

#include <stdint.h>

#include "common/operator.h"
#include "cpu/isa.h"

namespace eqr::cpu {

struct TrainingRow {
  const int64_t* tokens;         // [S], each in 0..V-1
  const int64_t* rng;            // [4]: seed, restart, id, outer steps done
  const float *last_H, *last_L;  // [S, d], the states as only the last latent recursion is left
  float noise_scale;
};

struct TrainingTarget {
  const int64_t* labels;           // [S], each in 0..V-1; 0 is not scored
  const float *start_H, *start_L;  // [S, d], the states that the outer step began with
  float share;                     // of the batch's loss: 1 / rows
};

struct TrainingResult {
  double loss;  // token losses + 0.5 * halting loss of this row, not yet divided by the rows
  float q_halt, residual;
  bool exact;
};

// The gradients of all weights in fp32, one after another: embedding [V, d], lm_head [V, d], q_weight [2, d], q_bias
// [2], then mixer_in, mixer_out, gate_up and down of each layer, as in BlockWeights.
inline int64_t gradient_floats(const Shape& s) {
  const int64_t block = 3 * (s.mixer_hidden * s.tokens + s.hidden * s.features);
  return 2 * s.vocabulary * s.features + 2 * s.features + 2 + s.layers * block;
}

// A worker's workspace is 64-byte aligned and zero when new; rows add their gradients to it, in the order of the calls.
// The kernels take the token mixer (heads 0) only. z_H, z_L [S, d] after the step may lie where last_H, last_L do.
//   training_pack       part `part` of 0..kTrainingParts * layers of the operands; they may be made side by side
//   training_row        forward, objective and backward
//   training_forward    -> q_halt; logits [S, V]
//   training_backward   from the gradients of logits [S, V] and of q_halt; computes the recursion again
//   training_gradients  the workers' sum of the gradients of part `part`, likewise
constexpr int64_t kTrainingParts = 4;  // of a layer; one more holds what is not a layer's
#define EQR_TRAINING_KERNELS \
  int64_t training_packed_bytes(const Shape&); \
  void training_pack(const Shape&, const OperatorWeights&, int64_t part, void* packed); \
  int64_t training_workspace_bytes(const Shape&); \
  void training_begin(const Shape&, void* workspace); \
  TrainingResult training_row(const Shape&, const void* packed, void* workspace, const TrainingRow&, \
                              const TrainingTarget&, float* z_H, float* z_L); \
  float training_forward(const Shape&, const void* packed, void* workspace, const TrainingRow&, float* z_H, \
                         float* z_L, float* logits); \
  void training_backward(const Shape&, const void* packed, void* workspace, const TrainingRow&, \
                         const float* of_logits, float of_q_halt); \
  void training_gradients(const Shape&, void* const* workspaces, int64_t workers, int64_t part, float* gradients);
EQR_FOR_EACH_ISA(EQR_TRAINING_KERNELS)
#undef EQR_TRAINING_KERNELS

// A worker's scratch: the workspace above and, behind it, one of Engine::recur. Zero when new.
struct TrainingScratch {
  int64_t training, recursions;
  int64_t bytes() const { return training + recursions; }
};
TrainingScratch training_scratch(const Shape&, Isa);

}  // namespace eqr::cpu
