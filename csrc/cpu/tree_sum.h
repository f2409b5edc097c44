#pragma once

#include <stdint.h>

namespace eqr::cpu {

// Sum of x[0 .. n) as a balanced tree: an order, and so a rounding, that depends on n alone. 0 for n = 0.
inline float tree_sum(const float* x, int64_t n) {
  if (n <= 2) return n == 2 ? x[0] + x[1] : n == 1 ? x[0] : 0.0f;
  const int64_t half = n / 2;
  return tree_sum(x, half) + tree_sum(x + half, n - half);
}

}  // namespace eqr::cpu
