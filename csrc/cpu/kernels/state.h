// A latent state [S, d] to the panels of a workspace, whose padding is zero, and back.
#pragma once

#include "cpu/kernels/layout.h"

namespace eqr::cpu::EQR_ISA {

EQR_INLINE size_t panel_bytes(const Sizes& z, int64_t p) {
  const int64_t left = z.d - p * kPanel;
  return size_t(4 * (left < kPanel ? left : kPanel));
}

EQR_INLINE void to_panels(const Sizes& z, const float* from, float* state) {
  for (int64_t p = 0; p < z.panels; ++p)
    for (int64_t t = 0; t < z.S; ++t) {
      float* to = state + (p * z.S + t) * kPanel;
      memset(to, 0, 4 * kPanel);
      memcpy(to, from + t * z.d + p * kPanel, panel_bytes(z, p));
    }
}

EQR_INLINE void from_panels(const Sizes& z, const float* state, float* to) {
  for (int64_t p = 0; p < z.panels; ++p)
    for (int64_t t = 0; t < z.S; ++t)
      memcpy(to + t * z.d + p * kPanel, state + (p * z.S + t) * kPanel, panel_bytes(z, p));
}

}  // namespace eqr::cpu::EQR_ISA
