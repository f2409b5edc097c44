// The operator of an Equilibrium Reasoner: its sizes, its packed weights, and one outer step of one trajectory.
// S tokens, d features, V vocabulary, k hidden units.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "team.h"

namespace eqr::cpu {

enum class Precision : int32_t { fp32, bf16, int8 };

struct Shape {
  int64_t tokens, features, vocabulary;
  int64_t mixer_hidden;  // k(S) of the token SwiGLU; 0 with attention
  int64_t hidden;        // k(d); a multiple of 256, as mixer_hidden
  int64_t heads;         // of the attention; 0 with the token SwiGLU
  int64_t layers, H_cycles, L_cycles;
  int64_t rope_parts;   // 0: no rotary embedding; 1: a head rotates as a whole; 2: each half by itself
  int64_t fixed_start;  // 0: random start states; 1: OperatorWeights::H_start and L_start
  float lambda, keep, norm_eps;  // keep = 1 - lambda
  float H_std, L_std;  // of the random start states
};

struct BlockWeights {
  const float* mixer_in;   // [2 k(S), S] gate rows first; or [3 d, d]: q heads, k heads, v heads
  const float* mixer_out;  // [S, k(S)]; or [d, d]
  const float* gate_up;    // [2 k(d), d] gate rows first
  const float* down;       // [d, k(d)]
};

struct OperatorWeights {
  const float* embedding;  // [V, d]
  const float* lm_head;    // [V, d]
  const float* q_weight;   // [2, d]
  const float* q_bias;     // [2]
  const BlockWeights* blocks;  // [layers]
  const float *cos, *sin;        // [S, d / heads], or null without Shape::rope_parts
  const float *H_start, *L_start;  // [d], the same for every token; or null without Shape::fixed_start
};

// Weights in the order in which an instruction set's kernels read them. Plain data that holds no pointer: it may be
// copied, at an alignment of 64 bytes, within the machine.
struct Packed;

// What an outer step depends on besides weights and state.
struct StepInput {
  const int64_t* tokens;  // [S], each in 0..V-1
  int64_t rng[4];         // seed, restart, id, outer steps done
  float noise_scale;
};

// Latent recursions of one trajectory whose state and noise the caller has.
struct Recursions {
  const int64_t* tokens;  // [S], each in 0..V-1
  int64_t count;
  float *z_H, *z_L;  // [S, d], in and out
  const float* eps;  // update i's [S, d] at i * eps_stride; null without noise
  int64_t eps_stride;
  float noise_scale;
};

// The first bytes of a workspace; valid, for every member of the team, once `outer_step` has returned.
struct StepOutput {
  const float* logits;  // [S, V]
  float q_halt;
  float change_sq, size_sq;  // ||z - z of the step before||^2 and ||z||^2 over (z_H, z_L)
};

// A kernel set for packed weights. `workspace` is one trajectory's, 64-byte aligned and zero when new; every member of
// the team makes the same calls with the same arguments but its own `Member`. A team may be another at each call.
struct Engine {
  const Packed* packed;
  int64_t tokens, vocabulary;
  int64_t workspace_bytes;
  void (*start)(const Packed*, void* workspace, const StepInput&, const Member&);  // rng[3] is 0
  void (*outer_step)(const Packed*, void* workspace, const StepInput&, const Member&);
  const Shape* shape;
  void (*recur)(const Packed*, void* workspace, const Recursions&);  // by one thread alone
};

int64_t packed_bytes(const Shape&, Precision, Isa);
void pack(const Shape&, Precision, Isa, const OperatorWeights&, Packed* out);

// Throws std::invalid_argument when `packed` (of `bytes`) is no such thing, or was packed for an instruction set that
// this build or machine lacks.
Engine engine(const Packed* packed, int64_t bytes);

#define EQR_OPERATOR_KERNELS                                            \
  int64_t packed_bytes(const Shape&, Precision);                        \
  void pack(const Shape&, Precision, const OperatorWeights&, Packed*);  \
  int64_t workspace_bytes(const Packed*);                               \
  void start(const Packed*, void*, const StepInput&, const Member&);    \
  void outer_step(const Packed*, void*, const StepInput&, const Member&); \
  void recur(const Packed*, void*, const Recursions&);
EQR_FOR_EACH_ISA(EQR_OPERATOR_KERNELS)
#undef EQR_OPERATOR_KERNELS

}  // namespace eqr::cpu
