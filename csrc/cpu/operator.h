// The packed weights of an operator, and one outer step of one trajectory. S tokens, d features, V vocabulary.
#pragma once

#include <stdint.h>

#include "common/operator.h"
#include "cpu/isa.h"
#include "cpu/loop/team.h"

namespace eqr::cpu {

// Weights in the order in which an instruction set's kernels read them. Plain data that holds no pointer: it may be
// copied, at an alignment of 64 bytes, within the machine.
struct Packed;

// What an outer step depends on besides weights and state.
struct StepInput {
  const int64_t* tokens;  // [S], each in 0..V-1
  int64_t rng[4];         // seed, restart, id, outer steps done
  float noise_scale;
};

// Latent recursions of one trajectory whose state the caller has, and its noise where that is not drawn here.
struct Recursions {
  const int64_t* tokens;  // [S], each in 0..V-1
  int64_t count;
  float *z_H, *z_L;  // [S, d], in and out
  const float* eps;  // update i's [S, d] at i * eps_stride; or null
  int64_t eps_stride;
  float noise_scale;
  const int64_t* rng;  // as StepInput::rng, what the noise is drawn from where eps is null; null without noise
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
  // By one thread alone; z_H, z_L [S, d].
  void (*recur)(const Packed*, void* workspace, const Recursions&);
  void (*put_state)(const Packed*, void* workspace, const float* z_H, const float* z_L);  // in place of `start`
  void (*get_state)(const Packed*, const void* workspace, float* z_H, float* z_L);
};

int64_t packed_bytes(const Shape&, Precision, Isa);
void pack(const Shape&, Precision, Isa, const OperatorWeights&, Packed* out);

// Throws std::invalid_argument when `packed` (of `bytes`) is no such thing, or was packed for an instruction set that
// this build or machine lacks.
Engine engine(const Packed* packed, int64_t bytes);

#define EQR_OPERATOR_KERNELS \
  int64_t packed_bytes(const Shape&, Precision); \
  void pack(const Shape&, Precision, const OperatorWeights&, Packed*); \
  int64_t workspace_bytes(const Packed*); \
  void start(const Packed*, void*, const StepInput&, const Member&); \
  void outer_step(const Packed*, void*, const StepInput&, const Member&); \
  void recur(const Packed*, void*, const Recursions&); \
  void put_state(const Packed*, void*, const float*, const float*); \
  void get_state(const Packed*, const void*, float*, float*);
EQR_FOR_EACH_ISA(EQR_OPERATOR_KERNELS)
#undef EQR_OPERATOR_KERNELS

}  // namespace eqr::cpu
