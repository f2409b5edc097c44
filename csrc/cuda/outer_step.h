// One outer step of the trajectory in a CTA, around the two mixers: damping, noise, injection, residual and heads.
#pragma once

#include "cuda/channel_mixer.h"
#include "cuda/token_mixer.h"

namespace eqr::cuda {

template <class Be, int D>
struct OuterStep {
  const Problem& p;
  Scratch<D>& s;

  EQR_DEVICE Elements<Be, D> elements() const { return Elements<Be, D>::of(p, s.control); }

  // Calls visit(token, feature, index, at) for every four features that this thread owns: `index` is their place in a
  // state and `at` that in the operand. A loop and not unrolled: random numbers would fill the instruction cache.
  template <class Visit>
  EQR_DEVICE static void for_each_owned(const Lane& l, Visit visit) {
    int index = int(l.thread);
    for (int pair = 0; pair < Sizes<D>::kRows / 2; ++pair)
      for (int tile = 0; tile < kTiles; ++tile)
        for (int odd = 0; odd < 2; ++odd, index += Sizes<D>::kThreads)
          visit(l.token(tile, odd), l.feature<D>(pair), index, l.quad_at<D>(pair, tile, odd));
  }

  // The start states, no logits yet, and the first module's operand.
  EQR_DEVICE void start(const Lane& l, const Slot<D>& slot) const {
    const Elements<Be, D> of = elements();
    const RngRow of_H = of.rng(kStreamH), of_L = of.rng(kStreamL);
    for_each_owned(l, [&](int token, int feature, int index, int) {
      slot.z_H(0)[index] = of.real(token) ? of.start(of_H, true, token, feature) : Quad{};
      slot.z_L(0)[index] = of.real(token) ? of.start(of_L, false, token, feature) : Quad{};
    });
    for (int i = l.thread; i < p.shape.tokens * p.shape.vocabulary; i += Sizes<D>::kThreads) slot.logits(0)[i] = 0;
    inject(l, slot);
  }

  // The operand of a step's first module.
  EQR_DEVICE void inject(const Lane& l, const Slot<D>& slot) const {
    const Elements<Be, D> of = elements();
    const int now = int(of.steps & 1);
    for_each_owned(l, [&](int token, int feature, int index, int at) {
      Quad u = {};
      if (of.real(token)) u = of.injected(slot.z_L(now)[index], slot.z_H(now)[index], true, token, feature);
      store_operand<Be>(s, at, u);
    });
  }

  // Ends module `number`: its state's update, and the next module's operand; after the last one z_H, for the heads.
  EQR_DEVICE void update(const Lane& l, const Slot<D>& slot, int number, const Sums<D>& y) const {
    const Elements<Be, D> of = elements();
    const Update step = Update::of(p.shape, number, of.steps);
    const Quad* from = step.is_H ? slot.z_H(step.from) : slot.z_L(step.from);
    const Quad* old = step.is_H ? slot.z_H(step.old) : slot.z_L(step.old);
    const Quad* other = step.is_H ? slot.z_L(step.other) : slot.z_H(step.other);
    Quad* to = step.is_H ? slot.z_H(step.to) : slot.z_L(step.to);
    Quad* const made = slot.u();
    for_each_quad<D>([&](int pair, int tile, int odd) {
      made[((pair * kTiles + tile) * 2 + odd) * Sizes<D>::kThreads + l.thread] = quad_of<D>(y, pair, tile, odd);
    });
    const RngRow row = of.rng(kFirstUpdate + uint32_t(number));
    float change_sq = 0, size_sq = 0;
    for_each_owned(l, [&](int token, int feature, int index, int at) {
      Quad z = {}, u = {};
      if (of.real(token)) {
        z = u = of.damped(row, from[index], made[index], token, feature);
        if (step.measure) measure(z, old[index], change_sq, size_sq);
        if (!step.last) u = of.injected(z, other[index], !step.next_is_H, token, feature);
      }
      to[index] = z;
      store_operand<Be>(s, at, u);
    });
    if (!step.measure) return;
    change_sq = sum_places<Be>(sum_groups<Be>(change_sq));
    size_sq = sum_places<Be>(sum_groups<Be>(size_sq));
    if (l.lane == 0) s.sums[step.is_H][l.warp][0] = change_sq, s.sums[step.is_H][l.warp][1] = size_sq;
  }

  // Logits and q_halt of the operand, into the buffer that does not hold the last finite logits; what came of the
  // step, in parts, into the scratch. A barrier before and after it.
  EQR_DEVICE void heads(const Lane& l, const Slot<D>& slot) const {
    const int V = int(p.shape.vocabulary), tokens = int(p.shape.tokens), rows = head_rows(p.shape);
    const float* old = slot.logits(s.control.logits);
    float* to = slot.logits(s.control.logits ^ 1);
    float bad = 0;
    for (int tile = l.warp; tile < kTiles; tile += Sizes<D>::kWarps) {
      float change[2] = {0, 0};
      for (int row = 0; row < rows; row += 16) {
        float c[4] = {};
        multiply_heads(l, row, tile, c);
        EQR_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int v = row + l.group + i / 2 * 8, token = l.token(tile, i % 2);
          if (v < V && token < tokens) {
            const float difference = c[i] - old[token * V + v];
            to[token * V + v] = c[i];
            change[i % 2] += difference * difference;
            if (c[i] - c[i] != 0.0f) bad = 1;
          } else if (v == V && token == 0) {
            s.q_halt = c[i] + *reinterpret_cast<const float*>(p.packed + p.layout.q_bias);
          }
        }
      }
      EQR_UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        const float sum = sum_groups<Be>(change[odd]);
        if (l.group == 0) s.scale[l.token(tile, odd)] = Be::sqrt(sum);
      }
    }
    bad = sum_places<Be>(sum_groups<Be>(bad));
    if (l.lane == 0) s.bad[l.warp] = bad;
  }

  // By the leader, behind a barrier after `heads`.
  EQR_DEVICE StepSums sums() const {
    StepSums out = {0, 0, 0, s.q_halt, true};
    for (int w = 0; w < Sizes<D>::kWarps; ++w) {
      for (int i = 0; i < 2; ++i) {
        out.change_sq += s.sums[i][w][0];
        out.size_sq += s.sums[i][w][1];
      }
      out.finite = out.finite && s.bad[w] == 0;
    }
    for (int token = 0; token < p.shape.tokens; ++token) out.logits_change += double(s.scale[token]);
    return out;
  }

 private:
  // c += 16 rows of the heads times 8 tokens
  EQR_DEVICE void multiply_heads(const Lane& l, int row, int tile, float (&c)[4]) const {
    const char* weights = p.packed + p.layout.heads + int64_t{row} * D * 2 + l.lane * 4;
    for (int k = 0; k < D / 16; k += 2) {
      uint32_t b[4];
      Be::load_matrices(b, s.operand + operand_at<D>(tile, 0, k * 2, 0) + l.lane * 16);
      EQR_UNROLL
      for (int i = 0; i < 2; ++i) {
        uint32_t a[4];
        EQR_UNROLL
        for (int j = 0; j < 4; ++j)
          a[j] = *reinterpret_cast<const uint32_t*>(weights + (j % 2 * (D / 8) + (k + i) * 2 + j / 2) * 128);
        Be::mma(c, a, b[2 * i], b[2 * i + 1]);
      }
    }
  }
};

}  // namespace eqr::cuda
