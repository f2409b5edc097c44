// The head of packed weights; engine.cpp reads it, the kernels know what follows. Offsets are in bytes from the head,
// multiples of 64; 0 means that there is none.
#pragma once

#include "cpu/operator.h"

namespace eqr::cpu {

constexpr int64_t kPackedMagic = 0x3177526571452E31;

struct PackedLayer {
  int64_t mixer_in, mixer_out, gate_up, down;
};

struct Packed {
  int64_t magic, bytes;
  Isa isa;
  Precision precision;
  Shape shape;
  int64_t embedding, lm_head, q_weight, q_bias, cos, sin, H_start, L_start;
  int64_t layers;  // PackedLayer [shape.layers]
};

}  // namespace eqr::cpu
