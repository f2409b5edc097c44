// A trajectory's start state, and any other that it is given or asked for. Built once per instruction set, with EQR_ISA
// naming the namespace.
#include "cpu/kernels/layout.h"
#include "cpu/kernels/normal_block.h"
#include "cpu/kernels/state.h"

namespace eqr::cpu::EQR_ISA {
namespace {

// The normal cut at +-2 and divided by its standard deviation 0.8796: sqrt(2) / 0.8796 erfinv(t) with
// t = erf(sqrt(2)) (2 u - 1). erfinv(t) / t is smooth in l = -ln(1 - t^2), here in [0, 2.42]: minimax, 4e-9.
EQR_INLINE float truncated_normal(uint32_t word) {
  const float v = 2.0f * uniform(word) - 1.0f, t = 0x1.e8b430p-1f * v;
  const float l = -logarithm((1.0f - t) * (1.0f + t));
  const float s = l * 0x1.a7285p-1f - 1.0f;  // in [-1, 1]
  float p = -0x1.79e476p-20f;
  p = p * s - 0x1.e3c6b4p-17f;
  p = p * s + 0x1.606e1ep-14f;
  p = p * s + 0x1.33b016p-12f;
  p = p * s - 0x1.083ff8p-8f;
  p = p * s + 0x1.0b196ap-8f;
  p = p * s + 0x1.34e3c2p-2f;
  p = p * s + 0x1.2df87cp+0f;
  return 0x1.88db04p+0f * v * p;  // sqrt(2) erf(sqrt(2)) / 0.8796
}

void random_start(const Sizes& z, const Workspace& w, const StepInput& in, uint32_t stream, float std, float* state,
                  const Member& m) {
  const int64_t count = z.S * z.d, blocks = (count + kBlock - 1) / kBlock;
  const RngRow row = rng_row(in.rng, stream);
  alignas(64) uint32_t words[4][kCounters];
  for (int64_t b = m.begin(blocks); b < m.end(blocks); ++b) {
    const Span s = span(b, count, blocks);
    words_block(row, s.first_counter, s.counters, words);
    for (int i = 0; i < s.count; ++i) w.eps[s.start + i] = std * truncated_normal(words[i % 4][i / 4]);
  }
  m.sync();
  for (int64_t p = m.begin(z.panels); p < m.end(z.panels); ++p) {
    const int64_t first = p * kPanel, features = z.d - first < kPanel ? z.d - first : kPanel;
    for (int64_t t = 0; t < z.S; ++t) {
      float* to = state + (p * z.S + t) * kPanel;
      memcpy(to, w.eps + t * z.d + first, size_t(4 * features));
      // The trajectory before may have left NaN in the padding.
      memset(to + features, 0, size_t(4 * (kPanel - features)));
    }
  }
  m.sync();
}

void fixed_start(const Sizes& z, const float* start, float* state, const Member& m) {
  for (int64_t p = m.begin(z.panels); p < m.end(z.panels); ++p)
    for (int64_t t = 0; t < z.S; ++t) memcpy(state + (p * z.S + t) * kPanel, start + p * kPanel, 4 * kPanel);
  m.sync();
}

}  // namespace

void start(const Packed* packed, void* workspace, const StepInput& in, const Member& m) {
  const Sizes z = sizes_of(packed->shape);
  const Workspace w = workspace_of(packed, z, workspace);
  if (packed->shape.fixed_start) {
    fixed_start(z, at<float>(packed, packed->H_start), w.z_H, m);
    fixed_start(z, at<float>(packed, packed->L_start), w.z_L, m);
  } else {
    random_start(z, w, in, kStreamH, packed->shape.H_std, w.z_H, m);
    random_start(z, w, in, kStreamL, packed->shape.L_std, w.z_L, m);
  }
}

void put_state(const Packed* packed, void* workspace, const float* z_H, const float* z_L) {
  const Sizes z = sizes_of(packed->shape);
  const Workspace w = workspace_of(packed, z, workspace);
  to_panels(z, z_H, w.z_H);
  to_panels(z, z_L, w.z_L);
}

void get_state(const Packed* packed, const void* workspace, float* z_H, float* z_L) {
  const Sizes z = sizes_of(packed->shape);
  const Workspace w = workspace_of(packed, z, const_cast<void*>(workspace));
  from_panels(z, w.z_H, z_H);
  from_panels(z, w.z_L, z_L);
}

}  // namespace eqr::cpu::EQR_ISA
