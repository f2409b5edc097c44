// What the latency kernel keeps in global memory: a trajectory's own, and what it works on.
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

  char *own, *work;
  int64_t hidden_bytes, logits_bytes;

  EQR_HOST_DEVICE static int64_t of_hidden(const Shape& s) { return whole_lines(kTokens * s.hidden * 2); }
  EQR_HOST_DEVICE static int64_t of_logits(const Shape& s) { return whole_lines(s.tokens * s.vocabulary * 4); }
  EQR_HOST_DEVICE static int64_t slot_bytes(const Shape& s, int64_t ring) {
    return 4 * kState + 2 * of_logits(s) + whole_lines(ring * 4);
  }
  EQR_HOST_DEVICE static int64_t work_bytes(const Shape& s) {
    return kState + kState / 2 + of_hidden(s) + whole_lines(int64_t{sizeof(OfStep)});
  }
  EQR_DEVICE static LatencyScratch of(const Problem& p) {
    return {p.slots, p.work, of_hidden(p.shape), of_logits(p.shape)};
  }

  // States and what a block makes of them, by parts of 16 features: [parts][88 tokens][4]
  EQR_DEVICE Quad* z_H(int buffer) const { return reinterpret_cast<Quad*>(own + buffer * kState); }
  EQR_DEVICE Quad* z_L(int buffer) const { return reinterpret_cast<Quad*>(own + (2 + buffer) * kState); }
  EQR_DEVICE float* logits(int buffer) const {  // [S, V]
    return reinterpret_cast<float*>(own + 4 * kState + buffer * logits_bytes);
  }
  EQR_DEVICE float* changes() const { return logits(2); }  // [min(window, depth)]
  EQR_DEVICE Quad* v() const { return reinterpret_cast<Quad*>(work); }
  EQR_DEVICE char* operand() const { return work + kState; }              // bf16 [88, D] in cores
  EQR_DEVICE char* hidden() const { return work + kState + kState / 2; }  // bf16 [88, k] in cores
  EQR_DEVICE OfStep& of_step() const { return *reinterpret_cast<OfStep*>(hidden() + hidden_bytes); }
  EQR_DEVICE Control& control() const { return of_step().control; }
  EQR_DEVICE float* squares() const { return of_step().squares[0]; }
  EQR_DEVICE float* sums() const { return of_step().sums[0][0]; }

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
