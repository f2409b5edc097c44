// The arithmetic around the blocks, for four features of a token at a time: start states, injection, damping and noise.
#pragma once

#include "cuda/noise.h"
#include "cuda/problem.h"
#include "cuda/trajectory.h"

namespace eqr::cuda {

struct alignas(16) Quad {
  float v[4];
};

// Update `number` of an outer step, which ends a module. Of the two buffers of a state, `before` holds the last step's,
// which the residual needs, and `now` what this step has made of it.
struct Update {
  bool is_H, next_is_H;  // which state this update and the next one are of
  bool last;             // of the outer step
  bool measure;          // the last of its state
  int from, other, old,
      to;  // buffers: what is damped, the other state's, what the residual compares with, the result's

  EQR_DEVICE static Update of(const Shape& s, int number, int64_t steps) {
    const int cycle = int(s.L_cycles) + 1, of_cycle = number % cycle, recursion = number / cycle;
    const int before = int(steps & 1), now = before ^ 1;
    const int H = recursion == 0 ? before : now, L = number == 0 ? before : now;
    const bool is_H = of_cycle == s.L_cycles, next_is_H = of_cycle + 1 == s.L_cycles;
    const bool last_recursion = recursion + 1 == s.H_cycles;
    return {
        is_H,   next_is_H, is_H && last_recursion, last_recursion && (is_H || next_is_H), is_H ? H : L, is_H ? L : H,
        before, now};
  }
};

template <class Be, int D>
struct Elements {
  const Problem& p;
  int64_t puzzle, restart, steps;

  EQR_DEVICE static Elements of(const Problem& p, const Control& c) { return {p, c.puzzle, c.restart, c.steps}; }

  EQR_DEVICE bool real(int token) const { return token < p.shape.tokens; }

  EQR_DEVICE RngRow rng(uint32_t stream) const {
    const int64_t row[4] = {p.seed, restart, p.ids[puzzle], steps};
    return rng_row(row, stream);
  }

  // A start state; `row` is that of its stream.
  EQR_DEVICE Quad start(const RngRow& row, bool is_H, int token, int feature) const {
    if (p.shape.fixed_start)
      return *reinterpret_cast<const Quad*>(p.packed + p.layout.starts + ((is_H ? 0 : D) + feature) * 4);
    const Four x = truncated_normals<Be>(row, block_of(token, feature));
    const float std = is_H ? p.shape.H_std : p.shape.L_std;
    return {{std * x.v[0], std * x.v[1], std * x.v[2], std * x.v[3]}};
  }

  // What a module that updates z_L takes: z_L + z_H + e; for z_H without e.
  EQR_DEVICE Quad injected(const Quad& z, const Quad& other, bool with_e, int token, int feature) const {
    const Quad e = with_e ? injection(token, feature) : Quad{};
    Quad u;
    EQR_UNROLL
    for (int i = 0; i < 4; ++i) u.v[i] = z.v[i] + (other.v[i] + e.v[i]);
    return u;
  }

  // keep z + lambda u + noise_scale eps
  EQR_DEVICE Quad damped(const RngRow& row, const Quad& z, const Quad& u, int token, int feature) const {
    Quad out;
    EQR_UNROLL
    for (int i = 0; i < 4; ++i) out.v[i] = p.shape.keep * z.v[i] + p.shape.lambda * u.v[i];
    if (p.noise_scale != 0.0f) {
      const Four eps = normals<Be>(row, block_of(token, feature));
      EQR_UNROLL
      for (int i = 0; i < 4; ++i) out.v[i] += p.noise_scale * eps.v[i];
    }
    return out;
  }

 private:
  EQR_DEVICE static uint32_t block_of(int token, int feature) { return uint32_t(token * D + feature) / 4; }
  EQR_DEVICE const Quad& injection(int token, int feature) const {
    const int64_t word = p.tokens[puzzle * p.shape.tokens + token];
    return *reinterpret_cast<const Quad*>(p.packed + p.layout.injection + (word * D + feature) * 4);
  }
};

// Adds to ||z - old||^2 and ||z||^2.
EQR_DEVICE void measure(const Quad& z, const Quad& old, float& change_sq, float& size_sq) {
  EQR_UNROLL
  for (int i = 0; i < 4; ++i) {
    change_sq += (z.v[i] - old.v[i]) * (z.v[i] - old.v[i]);
    size_sq += z.v[i] * z.v[i];
  }
}

}  // namespace eqr::cuda
