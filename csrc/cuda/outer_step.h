// One outer step of the trajectory in a CTA, around the two mixers: damping, noise, injection, residual and heads.
#pragma once

#include "channel_mixer.h"
#include "token_mixer.h"

namespace eqr::cuda {

template <class Be, int D>
struct OuterStep {
  const Problem& p;
  Scratch<D>& s;

  EQR_DEVICE int64_t steps() const { return s.control.steps; }
  EQR_DEVICE RngRow rng(uint32_t stream) const {
    const int64_t row[4] = {p.seed, s.control.restart, p.ids[s.control.puzzle], steps()};
    return rng_row(row, stream);
  }
  EQR_DEVICE static uint32_t block_of(int token, int feature) { return uint32_t(token * D + feature) / 4; }
  EQR_DEVICE bool real(int token) const { return token < p.shape.tokens; }
  EQR_DEVICE const Quad& injection(int token, int feature) const {
    const int64_t word = p.tokens[s.control.puzzle * p.shape.tokens + token];
    return *reinterpret_cast<const Quad*>(p.packed + p.layout.injection + (word * D + feature) * 4);
  }

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
    const float* fixed = reinterpret_cast<const float*>(p.packed + p.layout.starts);
    const RngRow of_H = rng(kStreamH), of_L = rng(kStreamL);
    for_each_owned(l, [&](int token, int feature, int index, int) {
      Quad H = {}, L = {};
      if (real(token) && p.shape.fixed_start) {
        H = *reinterpret_cast<const Quad*>(fixed + feature);
        L = *reinterpret_cast<const Quad*>(fixed + D + feature);
      } else if (real(token)) {
        const Four h = truncated_normals<Be>(of_H, block_of(token, feature));
        const Four z = truncated_normals<Be>(of_L, block_of(token, feature));
        EQR_UNROLL
        for (int i = 0; i < 4; ++i) H.v[i] = p.shape.H_std * h.v[i], L.v[i] = p.shape.L_std * z.v[i];
      }
      slot.z_H(0)[index] = H;
      slot.z_L(0)[index] = L;
    });
    for (int i = l.thread; i < p.shape.tokens * p.shape.vocabulary; i += Sizes<D>::kThreads) slot.logits(0)[i] = 0;
    inject(l, slot);
  }

  // The operand of a step's first module: z_L + z_H + e.
  EQR_DEVICE void inject(const Lane& l, const Slot<D>& slot) const {
    const int now = int(steps() & 1);
    for_each_owned(l, [&](int token, int feature, int index, int at) {
      Quad u = {};
      if (real(token)) {
        const Quad L = slot.z_L(now)[index], H = slot.z_H(now)[index], e = injection(token, feature);
        EQR_UNROLL
        for (int i = 0; i < 4; ++i) u.v[i] = L.v[i] + (H.v[i] + e.v[i]);
      }
      store_operand<Be>(s, at, u);
    });
  }

  // Update `number` of the step ends a module: z <- keep z + lambda u + noise, and the next module's operand. The
  // states of the step before stay in the other buffers, for the residual. After the last update the operand is z_H,
  // for the heads.
  EQR_DEVICE void update(const Lane& l, const Slot<D>& slot, int number, const Sums<D>& y) const {
    const Shape& shape = p.shape;
    const int cycle = int(shape.L_cycles) + 1, of_cycle = number % cycle, recursion = number / cycle;
    const bool is_H = of_cycle == shape.L_cycles, next_is_H = of_cycle + 1 == shape.L_cycles;
    const bool last_recursion = recursion + 1 == shape.H_cycles, last = is_H && last_recursion;
    const bool measure = last_recursion && (is_H || next_is_H);
    const int before = int(steps() & 1), now = before ^ 1;
    const int H_now = recursion == 0 ? before : now, L_now = number == 0 ? before : now;  // not yet updated here: before
    const Quad* from = is_H ? slot.z_H(H_now) : slot.z_L(L_now);
    const Quad* old = is_H ? slot.z_H(before) : slot.z_L(before);
    const Quad* other = is_H ? slot.z_L(L_now) : slot.z_H(H_now);
    Quad* to = is_H ? slot.z_H(now) : slot.z_L(now);
    Quad* const made = slot.u();
    for_each_quad<D>([&](int pair, int tile, int odd) {
      made[((pair * kTiles + tile) * 2 + odd) * Sizes<D>::kThreads + l.thread] = quad_of<D>(y, pair, tile, odd);
    });
    const RngRow row = rng(kFirstUpdate + uint32_t(number));
    float change_sq = 0, size_sq = 0;
    for_each_owned(l, [&](int token, int feature, int index, int at) {
      Quad z = {}, u = {};
      if (real(token)) {
        const Quad x = made[index], previous = from[index];
        EQR_UNROLL
        for (int i = 0; i < 4; ++i) z.v[i] = shape.keep * previous.v[i] + shape.lambda * x.v[i];
        if (p.noise_scale != 0.0f) {
          const Four eps = normals<Be>(row, block_of(token, feature));
          EQR_UNROLL
          for (int i = 0; i < 4; ++i) z.v[i] += p.noise_scale * eps.v[i];
        }
        if (measure) {
          const Quad o = old[index];
          EQR_UNROLL
          for (int i = 0; i < 4; ++i) {
            change_sq += (z.v[i] - o.v[i]) * (z.v[i] - o.v[i]);
            size_sq += z.v[i] * z.v[i];
          }
        }
        u = z;
        if (!last) {
          const Quad o = other[index];
          const Quad e = next_is_H ? Quad{} : injection(token, feature);
          EQR_UNROLL
          for (int i = 0; i < 4; ++i) u.v[i] = z.v[i] + (o.v[i] + e.v[i]);
        }
      }
      to[index] = z;
      store_operand<Be>(s, at, u);
    });
    if (!measure) return;
    change_sq = sum_places<Be>(sum_groups<Be>(change_sq));
    size_sq = sum_places<Be>(sum_groups<Be>(size_sq));
    if (l.lane == 0) s.sums[is_H][l.warp][0] = change_sq, s.sums[is_H][l.warp][1] = size_sq;
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
