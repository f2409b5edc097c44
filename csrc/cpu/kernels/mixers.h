// The two halves of a block, and what they share. All members of a team call each with the same arguments but their
// Member; who computes what depends on it, the numbers do not.
#pragma once

#include "cpu/kernels/layout.h"
#include "cpu/kernels/share.h"

namespace eqr::cpu::EQR_ISA {

// One trajectory's outer step, as a member of its team sees it.
struct Context {
  const Packed* packed;
  Sizes z;
  Workspace w;
  Member m;
  Share share;
};

// u <- RMSnorm over tokens of (u + SwiGLU over tokens of u), and x, for one panel of features. Reads token_operand.
// `hidden` is scratch, [token_k][kPanel] floats.
template <Precision>
void token_mixer(const Context& c, const PackedLayer& layer, int64_t panel, void* hidden);

// u <- u + attention(x), and the squares. Reads x, spoils it. Ends with a sync.
template <Precision>
void attention(Context& c, const PackedLayer& layer);

template <Precision>
void channel_gate_up(Context& c, const PackedLayer& layer);
template <Precision>
void channel_down(Context& c, const PackedLayer& layer);

// Row-major operand of channel mixing at element `index`.
template <Precision kPrecision>
EQR_INLINE void put_operand(char* base, int64_t index, Vec value) {
  if constexpr (sizeof(typename Operand<kPrecision>::Type) == 2) {
    store_bf16(reinterpret_cast<uint16_t*>(base) + index, value);
  } else {
    if constexpr (kPrecision == Precision::bf16) value = round_bf16(value);
    store(reinterpret_cast<float*>(base) + index, value);
  }
}

template <Precision kPrecision>
EQR_INLINE void put_operand(char* base, int64_t index, float value) {
  if constexpr (sizeof(typename Operand<kPrecision>::Type) == 2) {
    reinterpret_cast<uint16_t*>(base)[index] = to_bf16(value);
  } else {
    reinterpret_cast<float*>(base)[index] = kPrecision == Precision::bf16 ? round_bf16(value) : value;
  }
}

// Rows [S, depth] of x or h as the operand of a product; in int8 it quantises them first, all members together.
template <class Op>
struct Rows {
  const typename Op::A* a;
  int64_t stride;
  const float* scale;  // [S], in int8
};

template <Precision kPrecision>
EQR_INLINE Rows<typename Ops<kPrecision>::Channel> rows_of(const Context& c, const char* operand, int64_t stride,
                                                           int64_t depth) {
  typedef typename Ops<kPrecision>::Channel Op;
  typedef typename Op::A A;
  if constexpr (kIsInt8<Op>) {
    A* out = reinterpret_cast<A*>(c.w.quantised);
    for (int64_t t = c.m.begin(c.z.S); t < c.m.end(c.z.S); ++t) {
      const float* from = reinterpret_cast<const float*>(operand) + t * stride;
      Vec most = Vec{}, probe = Vec{};
      for (int64_t k = 0; k < depth; k += kLanes) {
        const Vec v = load(from + k);
        most = maximum(absolute(v), most);
        probe += v - v;  // NaN where v is not finite, which the maximum does not show
      }
      const float top = largest(most);
      c.w.quantised_scale[t] = top / 127.0f + sum(probe);
      const Vec per_unit = splat(top >= 127.0f * kLeastUnit ? 127.0f / top : 0.0f);
      for (int64_t k = 0; k < depth; k += kLanes) {
        typedef A Narrow __attribute__((vector_size(sizeof(A) * kLanes)));
        const IVec q = nearest_int(load(from + k) * per_unit) + Op::kZeroPoint;
        const Narrow narrow = __builtin_convertvector(q, Narrow);
        memcpy(out + t * stride + k, &narrow, sizeof narrow);
      }
    }
    c.m.sync();
    return {out, stride, c.w.quantised_scale};
  } else {
    return {reinterpret_cast<const A*>(operand), stride, nullptr};
  }
}

// A tile's sums as fp32, in place: vector j of row i of a tile that starts at row `first`, panel p.
template <class Op>
EQR_INLINE Vec value_of(typename Op::Acc sum, const PanelMatrix<Op>& matrix, const Rows<Op>& rows, int64_t row,
                        int64_t p, int j) {
  if constexpr (kIsInt8<Op>) {
    const int64_t column = p * kPanel + j * kLanes;
    const Vec exact = __builtin_convertvector(sum - load_ints(matrix.correction + column), Vec);
    return exact * (load(matrix.scale + column) * splat(rows.scale[row]));
  } else {
    return sum;
  }
}

// rows @ matrix^T, matrix of `panels` panels, divided among the members: calls done(panel, first row, rows, sums) for
// each tile.
template <class Op, class Done>
EQR_INLINE void product(Context& c, const Rows<Op>& rows, const PanelMatrix<Op>& matrix, int64_t panels, Done&& done) {
  const RowGroups by = row_groups<Op>(c.z.S, matrix.steps);
  AmxShape shape;
  c.share.each(panels * by.groups.parts, [&](int64_t item) {
    const int64_t p = item / by.groups.parts, group = item % by.groups.parts;
    panel_product<Op, false>(
        shape, rows.a, rows.stride, by.tiles, by.groups.begin(group), by.groups.begin(group + 1), matrix.panel(p),
        matrix.steps, matrix.panel(p + 1),
        [&](int64_t first, int64_t count, const typename Op::Acc* sums) { done(p, first, count, sums); });
  });
}

// u <- u + rows @ matrix^T, and each token's sum of squares over each panel.
template <Precision kPrecision>
EQR_INLINE void add_product(Context& c, const Rows<typename Ops<kPrecision>::Channel>& rows, int64_t offset,
                            int64_t depth) {
  typedef typename Ops<kPrecision>::Channel Op;
  const Sizes& z = c.z;
  const PanelMatrix<Op> matrix = panel_matrix<Op>(c.packed, offset, z.panels, depth);
  product(c, rows, matrix, z.panels, [&](int64_t p, int64_t first, int64_t count, const typename Op::Acc* sums) {
    for (int64_t i = 0; i < count; ++i) {
      float* to = c.w.u + (p * z.S + first + i) * kPanel;
      const Vec a = load(to) + value_of(sums[2 * i], matrix, rows, first + i, p, 0);
      const Vec b = load(to + kLanes) + value_of(sums[2 * i + 1], matrix, rows, first + i, p, 1);
      store(to, a);
      store(to + kLanes, b);
      c.w.squares[p * z.S + first + i] = sum(fma(a, a, b * b));
    }
  });
}

}  // namespace eqr::cpu::EQR_ISA
