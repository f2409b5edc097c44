#include <stdexcept>
#include <string>

#include "cpu/packed.h"

namespace eqr::cpu {

int64_t packed_bytes(const Shape& shape, Precision precision, Isa isa) {
  return EQR_DISPATCH_TO(isa, packed_bytes, shape, precision);
}

void pack(const Shape& shape, Precision precision, Isa isa, const OperatorWeights& weights, Packed* out) {
  EQR_DISPATCH_TO(isa, pack, shape, precision, weights, out);
}

Engine engine(const Packed* packed, int64_t bytes) {
  if (bytes < int64_t(sizeof(Packed)) || packed->magic != kPackedMagic || packed->bytes != bytes)
    throw std::invalid_argument("packed holds no packed weights; make it with pack_weights on this machine");
  if (!runs(packed->isa))
    throw std::invalid_argument(std::string("packed was made for ") + isa_name(packed->isa) +
                                ", which this machine does not run; pack the weights here");
  Engine e{.packed = packed,
           .tokens = packed->shape.tokens,
           .vocabulary = packed->shape.vocabulary,
           .shape = &packed->shape};
  e.workspace_bytes = EQR_DISPATCH_TO(packed->isa, workspace_bytes, packed);
#define EQR_TAKE_KERNELS(level) \
  case Isa::level: \
    e.start = level::start; \
    e.outer_step = level::outer_step; \
    e.recur = level::recur; \
    e.put_state = level::put_state; \
    e.get_state = level::get_state; \
    break;
  switch (packed->isa) {
#ifdef EQR_X86
    EQR_TAKE_KERNELS(amx)
    EQR_TAKE_KERNELS(avx512_bf16)
    EQR_TAKE_KERNELS(avx512)
    EQR_TAKE_KERNELS(avx2)
#endif
    EQR_TAKE_KERNELS(portable)
    default: break;
  }
#undef EQR_TAKE_KERNELS
  return e;
}

}  // namespace eqr::cpu
