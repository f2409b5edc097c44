// Built once per instruction set, with EQR_ISA naming the namespace.
#include "cpu/adam_atan2.h"

#include "cpu/kernels/simd.h"

namespace eqr::cpu::EQR_ISA {
namespace {

// atan2(y, x) for x >= 0, to 3e-7 of its value; NaN where either is.
EQR_INLINE Vec arctangent(Vec y, Vec x) {
  const Vec size = absolute(y), zero = Vec{}, one = splat(1.0f);
  const Vec least = size < x ? size : x, most = size < x ? x : size;
  const Vec same = most == zero ? zero : one;  // of two zeros, of two infinities
  const Vec t = least == most ? same : least / most, s = t * t;
  Vec p = splat(0x1.7ed226p-9f);  // (atan(t) / t - 1) / s, minimax on 0 <= t <= 1
  p = fma(p, s, splat(-0x1.0c2c10p-6f));
  p = fma(p, s, splat(0x1.61fdd6p-5f));
  p = fma(p, s, splat(-0x1.3556b6p-4f));
  p = fma(p, s, splat(0x1.b4e12ap-4f));
  p = fma(p, s, splat(-0x1.230adcp-3f));
  p = fma(p, s, splat(0x1.9978f4p-3f));
  p = fma(p, s, splat(-0x1.5554dcp-2f));
  const Vec low = fma(p * s, t, t), angle = size > x ? splat(0x1.921fb6p+0f) - low : low;
  return bits<Vec>(bits<UVec>(angle) | (bits<UVec>(y) & 0x80000000u));
}

EQR_INLINE void update(const AdamATan2& a, float* weights, const float* gradients, float* means, float* squares) {
  const Vec g = load(gradients);
  const Vec m = fma(splat(a.rest1), g, splat(a.beta1) * load(means));
  const Vec v = fma(splat(a.rest2) * g, g, splat(a.beta2) * load(squares));
  const Vec turn = arctangent(m, splat(a.root_scale) * square_root(v));
  store(weights, fma(splat(-a.rate), turn, splat(a.keep) * load(weights)));
  store(means, m);
  store(squares, v);
}

}  // namespace

void adam_atan2(const AdamATan2& a, int64_t count, float* weights, const float* gradients, float* means,
                float* squares) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) update(a, weights + i, gradients + i, means + i, squares + i);
  if (i == count) return;
  float some[4][kLanes] = {};
  const size_t bytes = size_t(4 * (count - i));
  memcpy(some[0], weights + i, bytes), memcpy(some[1], gradients + i, bytes);
  memcpy(some[2], means + i, bytes), memcpy(some[3], squares + i, bytes);
  update(a, some[0], some[1], some[2], some[3]);
  memcpy(weights + i, some[0], bytes), memcpy(means + i, some[2], bytes), memcpy(squares + i, some[3], bytes);
}

}  // namespace eqr::cpu::EQR_ISA
