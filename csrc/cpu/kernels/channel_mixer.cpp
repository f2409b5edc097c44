// Channel mixing by a SwiGLU: two products whose weights are streamed in panels. The first one's epilogue is
// silu(gate) * up, the second one's the residual sum and the norm's squares.
// Built once per instruction set, with EQR_ISA naming the namespace.
#include "cpu/kernels/mixers.h"

namespace eqr::cpu::EQR_ISA {

template <Precision kPrecision>
void channel_gate_up(Context& c, const PackedLayer& layer) {
  typedef typename Ops<kPrecision>::Channel Op;
  const Sizes& z = c.z;
  const Rows<Op> x = rows_of<kPrecision>(c, c.w.x, z.x_stride, z.width);
  const int64_t panels = z.k / kLanes;  // a vector of gate columns and the up columns of the same units
  const PanelMatrix<Op> matrix = panel_matrix<Op>(c.packed, layer.gate_up, panels, z.width);
  product(c, x, matrix, panels, [&](int64_t p, int64_t first, int64_t count, const typename Op::Acc* sums) {
    for (int64_t i = 0; i < count; ++i) {
      const Vec gate = value_of(sums[2 * i], matrix, x, first + i, p, 0);
      const Vec up = value_of(sums[2 * i + 1], matrix, x, first + i, p, 1);
      const Vec hidden = swiglu<kRoundsToBf16<kPrecision>>(gate, up);
      put_operand<kPrecision>(c.w.h, (first + i) * z.h_stride + p * kLanes, hidden);
    }
  });
}

template <Precision kPrecision>
void channel_down(Context& c, const PackedLayer& layer) {
  add_product<kPrecision>(c, rows_of<kPrecision>(c, c.w.h, c.z.h_stride, c.z.k), layer.down, c.z.k);
}

template void channel_gate_up<Precision::fp32>(Context&, const PackedLayer&);
template void channel_gate_up<Precision::bf16>(Context&, const PackedLayer&);
template void channel_gate_up<Precision::int8>(Context&, const PackedLayer&);
template void channel_down<Precision::fp32>(Context&, const PackedLayer&);
template void channel_down<Precision::bf16>(Context&, const PackedLayer&);
template void channel_down<Precision::int8>(Context&, const PackedLayer&);

}  // namespace eqr::cpu::EQR_ISA
