// Built once per instruction set, with EQR_ISA naming the namespace.
#include "cpu/philox.h"

#include "cpu/kernels/normal_block.h"

namespace eqr::cpu::EQR_ISA {

void philox_words(const Philox& a, int64_t* out, int64_t begin, int64_t end) {
  alignas(64) uint32_t words[4][kCounters];
  for (int64_t item = begin; item < end; ++item) {
    const Span s = span(item, a.row, a.blocks);
    words_block(rng_row(a.rng + 4 * s.n, a.stream), s.first_counter, s.counters, words);
    for (int i = 0; i < s.count; ++i) out[s.start + i] = words[i % 4][i / 4];
  }
}

void philox_normal(const Philox& a, float* out, int64_t begin, int64_t end) {
  alignas(64) float eps[kBlock];
  for (int64_t item = begin; item < end; ++item) {
    const Span s = span(item, a.row, a.blocks);
    normal_block(rng_row(a.rng + 4 * s.n, a.stream), s.first_counter, s.counters, eps);
    memcpy(out + s.start, eps, sizeof(float) * size_t(s.count));
  }
}

}  // namespace eqr::cpu::EQR_ISA
