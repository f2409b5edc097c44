// The training objective of one row, and its gradients (EqR, arXiv 2605.21488, section 3): cross-entropy under
// stablemax, s(x) = x + 1 for x >= 0 and 1 / (1 - x) below, and the halting head's binary cross-entropy.
#pragma once

#include "cpu/kernels/simd.h"

namespace eqr::cpu::EQR_ISA {

struct Objective {
  double loss;
  float dq;    // gradient of q_halt
  bool exact;  // every labelled token is right, and there is one
};

// logits [S][stride], of which V are used <- their gradients, times `share` as dq is
EQR_INLINE Objective objective(int64_t S, int64_t V, int64_t stride, float* logits, float q_halt, const int64_t* labels,
                               float share) {
  int64_t labelled = 0, right = 0;
  for (int64_t t = 0; t < S; ++t) labelled += labels[t] != 0;
  double loss = 0.0;
  for (int64_t t = 0; t < S; ++t) {
    float* x = logits + t * stride;
    if (labels[t] == 0) {
      for (int64_t v = 0; v < V; ++v) x[v] = 0.0f;
      continue;
    }
    int64_t most = 0;
    double total = 0.0;
    const auto s = [](double a) { return a < 0 ? 1 / (1 - a) : a + 1; };
    for (int64_t v = 0; v < V; ++v) {
      // NaN is the greatest, as in torch.argmax.
      if (x[v] > x[most] || (x[v] != x[v] && x[most] == x[most])) most = v;
      total += s(x[v]);
    }
    right += most == labels[t];
    const double of_label = s(x[labels[t]]), scale = double(share) / double(labelled);
    loss -= log(of_label / total) / double(labelled);
    for (int64_t v = 0; v < V; ++v) {
      const double slope = x[v] < 0 ? 1 / ((1 - double(x[v])) * (1 - double(x[v]))) : 1.0;
      x[v] = float(scale * slope * (1 / total - (v == labels[t] ? 1 / of_label : 0.0)));
    }
  }
  const bool exact = labelled && right == labelled;
  // log(1 + e^-|q|) is all that is left where q has the right sign.
  const double q = q_halt, wrong = (exact ? -q : q) > 0 ? fabs(q) : 0.0;
  loss += 0.5 * (q != q ? q : wrong + log1p(exp(-fabs(q))));
  return {loss, float(0.5 * double(share) * (1 / (1 + exp(-q)) - (exact ? 1.0 : 0.0))), exact};
}

}  // namespace eqr::cpu::EQR_ISA
