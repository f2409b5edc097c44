// What the latency kernel keeps in global memory of the one trajectory in flight.
#pragma once

#include "cuda/elements.h"
#include "cuda/packed.h"
#include "cuda/problem.h"
#include "cuda/trajectory.h"

namespace eqr::cuda {

template <int D>
struct LatencyScratch {
  static constexpr int kParts = D / 16;
  static constexpr int64_t kState = int64_t{kTokens} * D * 4;  // bytes

  struct OfStep {
    Control control;
    float q_halt;
    float change[kTokens], bad[kTokens];  // of a token's logits: how far they have moved, whether any is not finite
    float sums[kParts][2][2];             // of the residual: of a part's z_L and z_H, change and size
    float squares[kParts][kTokens];       // of a part's features, for the norm
  };

  char* base;
  int64_t hidden_bytes, logits_bytes;

  EQR_HOST_DEVICE static int64_t of_hidden(const Shape& s) { return whole_lines(kTokens * s.hidden * 2); }
  EQR_HOST_DEVICE static int64_t of_logits(const Shape& s) { return whole_lines(s.tokens * s.vocabulary * 4); }
  EQR_HOST_DEVICE static int64_t bytes(const Shape& s, int64_t ring) {
    return 5 * kState + kState / 2 + of_hidden(s) + 2 * of_logits(s) + whole_lines(int64_t{sizeof(OfStep)}) +
           whole_lines(ring * 4);
  }
  EQR_DEVICE static LatencyScratch of(const Problem& p) { return {p.slots, of_hidden(p.shape), of_logits(p.shape)}; }

  // States and what a block makes of them, by parts of 16 features: [parts][88 tokens][4]
  EQR_DEVICE Quad* z_H(int buffer) const { return reinterpret_cast<Quad*>(base + buffer * kState); }
  EQR_DEVICE Quad* z_L(int buffer) const { return reinterpret_cast<Quad*>(base + (2 + buffer) * kState); }
  EQR_DEVICE Quad* v() const { return reinterpret_cast<Quad*>(base + 4 * kState); }
  EQR_DEVICE char* operand() const { return base + 5 * kState; }              // bf16 [88, D] in cores
  EQR_DEVICE char* hidden() const { return base + 5 * kState + kState / 2; }  // bf16 [88, k] in cores
  EQR_DEVICE float* logits(int buffer) const {                                // [S, V]
    return reinterpret_cast<float*>(hidden() + hidden_bytes + buffer * logits_bytes);
  }
  EQR_DEVICE OfStep& of_step() const { return *reinterpret_cast<OfStep*>(logits(2)); }
  EQR_DEVICE Control& control() const { return of_step().control; }
  EQR_DEVICE float* squares() const { return of_step().squares[0]; }
  EQR_DEVICE float* sums() const { return of_step().sums[0][0]; }
  EQR_DEVICE float* changes() const {  // [min(window, depth)]
    return reinterpret_cast<float*>(reinterpret_cast<char*>(&of_step()) + whole_lines(int64_t{sizeof(OfStep)}));
  }

  EQR_DEVICE StepSums step_sums(int tokens) const {
    const OfStep& s = of_step();
    StepSums out = {0, 0, 0, s.q_halt, true};
    for (int part = 0; part < kParts; ++part)
      for (int i = 0; i < 2; ++i) {
        out.change_sq += s.sums[part][i][0];
        out.size_sq += s.sums[part][i][1];
      }
    for (int token = 0; token < tokens; ++token) {
      out.logits_change += double(s.change[token]);
      out.finite = out.finite && s.bad[token] == 0;
    }
    return out;
  }
};

}  // namespace eqr::cuda
