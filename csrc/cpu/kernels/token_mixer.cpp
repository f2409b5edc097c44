// Token mixing by a SwiGLU. The weights are the operand that is broadcast and a panel of features is the one that is
// loaded, so no transpose is needed and a panel never leaves the nearest caches between the two products.
// Built once per instruction set, with EQR_ISA naming the namespace.
#include "cpu/kernels/mixers.h"

namespace eqr::cpu::EQR_ISA {
namespace {

// The gates of `units` units, then their ups.
template <class Op, int kUnits = kTileUnits>
EQR_INLINE void tile_of_units(AmxShape& shape, int64_t units, const typename Op::A* a, const typename Op::B* b,
                              int64_t steps, Vec* out) {
  const char* next = reinterpret_cast<const char*>(a + 2 * units * steps * Op::kDepth);
  if constexpr (kUsesAmx<Op>)
    panel_tile<Op, true>(shape, 2 * units, a, 2 * units * Op::kDepth, b, kPanel * Op::kB, steps, out, next);
  else if (units == kUnits)
    tile<Op, 2 * kUnits, 2, true>(a, 2 * kUnits * Op::kDepth, b, kPanel * Op::kB, steps, out, 2, next);
  else if constexpr (kUnits > 1)
    tile_of_units<Op, kUnits - 1>(shape, units, a, b, steps, out);
}

// Hidden units `first`.. of a panel, as the operand of the second product: hidden [depth / kB][kPanel][kB].
template <class Op, bool kRound>
EQR_INLINE void put_hidden(const Vec* sums, int64_t first, int64_t units, typename Op::B* hidden) {
  for (int j = 0; j < 2; ++j) {
    const auto unit = [&](int64_t i) { return swiglu<kRound>(sums[2 * i + j], sums[2 * (units + i) + j]); };
    if constexpr (Op::kB == 2) {
      for (int64_t i = 0; i < units; i += 2) {
        const UVec pair = pair_bf16(unit(i), unit(i + 1));
        memcpy(hidden + ((first + i) / 2 * kPanel + j * kLanes) * 2, &pair, sizeof pair);
      }
    } else {
      for (int64_t i = 0; i < units; ++i)
        store(hidden + (first + i) * kPanel + j * kLanes, kRound ? round_bf16(unit(i)) : unit(i));
    }
  }
}

}  // namespace

template <Precision kPrecision>
void token_mixer(const Context& c, const PackedLayer& layer, int64_t p, void* scratch) {
  typedef typename Ops<kPrecision>::Token Op;
  typedef typename Op::B B;
  static_assert(Op::kB == 1 || kUnitsOf<Op> % 2 == 0, "a pair of hidden units must not lie in two tiles");
  const Sizes& z = c.z;
  const typename Op::A* gate_up = at<typename Op::A>(c.packed, layer.mixer_in);
  const typename Op::A* down = at<typename Op::A>(c.packed, layer.mixer_out);
  const int64_t steps = steps_of<Op>(z.S), hidden_steps = steps_of<Op>(z.token_k);
  const B* operand = reinterpret_cast<const B*>(c.w.token_operand) + p * steps * kPanel * Op::kDepth;
  B* hidden = static_cast<B*>(scratch);
  const Parts parts = parts_of(z.token_k, kUnitsOf<Op>);
  AmxShape shape;
  for (int64_t t = 0; t < parts.parts; ++t) {
    Vec sums[2 * kUnitsOf<Op> * 2];
    const int64_t first = parts.begin(t), units = parts.begin(t + 1) - first;
    tile_of_units<Op>(shape, units, gate_up + 2 * first * steps * Op::kDepth, operand, steps, sums);
    put_hidden<Op, kRoundsToBf16<kPrecision>>(sums, first, units, hidden);
  }
  float* u = c.w.u + p * z.S * kPanel;
  Vec squares[2] = {Vec{}, Vec{}};
  const Parts tiles = parts_of(z.S, kRowsOf<Op>);
  panel_product<Op, true>(shape, down, 0, tiles, 0, tiles.parts, hidden, hidden_steps, down,
                          [&](int64_t first, int64_t count, const Vec* sums) {
                            for (int64_t i = 0; i < count; ++i)
                              for (int j = 0; j < 2; ++j) {
                                float* to = u + (first + i) * kPanel + j * kLanes;
                                const Vec a = load(to) + sums[2 * i + j];
                                squares[j] = fma(a, a, squares[j]);
                                store(to, a);
                              }
                          });
  for (int j = 0; j < 2; ++j) {
    const Vec norm = square_root(squares[j] / splat(float(z.S)) + splat(c.packed->shape.norm_eps));
    // The padding is zero and stays so, whatever 1 / norm is there.
    const Vec scale = first_lanes(splat(1.0f) / norm, z.d - p * kPanel - j * kLanes);
    for (int64_t t = 0; t < z.S; ++t) {
      float* to = u + t * kPanel + j * kLanes;
      const Vec a = load(to) * scale;
      store(to, a);
      put_operand<kPrecision>(c.w.x, t * z.x_stride + p * kPanel + j * kLanes, a);
    }
  }
}

template void token_mixer<Precision::fp32>(const Context&, const PackedLayer&, int64_t, void*);
template void token_mixer<Precision::bf16>(const Context&, const PackedLayer&, int64_t, void*);
template void token_mixer<Precision::int8>(const Context&, const PackedLayer&, int64_t, void*);

}  // namespace eqr::cpu::EQR_ISA
