// Built once per instruction set, with EQR_ISA naming the namespace.
#include "cpu/damped_update.h"

#include "cpu/kernels/normal_block.h"

namespace eqr::cpu::EQR_ISA {
namespace {

constexpr int kLanes = 64;  // partial sums side by side, whatever the vector width, so that the order never changes

EQR_INLINE float widen(float x) { return x; }
EQR_INLINE float widen(uint16_t x) { return as_float(uint32_t(x) << 16); }

EQR_INLINE void round_to(float x, float* out) { *out = x; }
EQR_INLINE void round_to(float x, uint16_t* out) {
  const uint32_t bits = as_bits(x);
  const uint32_t nearest_even = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  *out = uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : nearest_even);
}

// acc[l] += x[i]^2 over the i of lane l, then the lanes as a tree. `n` is a multiple of kLanes.
EQR_INLINE float sum_of_squares(const float* x, int n) {
  alignas(64) float acc[kLanes] = {};
  for (int i = 0; i < n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) acc[l] += x[i + l] * x[i + l];
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) acc[l] += acc[l + half];
  return acc[0];
}

template <class T>
EQR_INLINE void residual_parts(const T* __restrict out, const T* __restrict z_prev, int count, float* diff,
                               float* norm) {
  alignas(64) float value[kBlock];
  const int padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int i = 0; i < count; ++i) value[i] = widen(out[i]);
  for (int i = count; i < padded; ++i) value[i] = 0.0f;
  *norm = sum_of_squares(value, padded);
  for (int i = 0; i < count; ++i) value[i] -= widen(z_prev[i]);
  *diff = sum_of_squares(value, padded);
}

}  // namespace

template <class T>
void damped_update(const DampedUpdate& a, int64_t begin, int64_t end) {
  alignas(64) float eps[kBlock];
  for (int64_t item = begin; item < end; ++item) {
    const Span s = span(item, a.row, a.blocks);
    const T* __restrict z = static_cast<const T*>(a.z) + s.start;
    const T* __restrict u = static_cast<const T*>(a.u) + s.start;
    T* __restrict out = static_cast<T*>(a.out) + s.start;
    const float keep = a.keep, lambda = a.lambda, scale = a.noise_scale;
    if (scale != 0.0f) {
      normal_block(rng_row(a.rng + 4 * s.n, a.stream), s.first_counter, s.counters, eps);
      for (int i = 0; i < s.count; ++i) round_to(keep * widen(z[i]) + lambda * widen(u[i]) + scale * eps[i], out + i);
    } else {
      for (int i = 0; i < s.count; ++i) round_to(keep * widen(z[i]) + lambda * widen(u[i]), out + i);
    }
    if (a.z_prev) {
      float* partial = a.partial + 2 * s.n * a.blocks + item % a.blocks;
      residual_parts(out, static_cast<const T*>(a.z_prev) + s.start, s.count, partial, partial + a.blocks);
    }
  }
}

template void damped_update<float>(const DampedUpdate&, int64_t, int64_t);
template void damped_update<uint16_t>(const DampedUpdate&, int64_t, int64_t);

}  // namespace eqr::cpu::EQR_ISA
