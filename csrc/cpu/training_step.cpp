#include "training_step.h"

#include "packed.h"

namespace eqr::cpu {

TrainingScratch training_scratch(const Shape& shape, Isa isa) {
  Packed weightless = {};
  weightless.shape = shape, weightless.precision = Precision::bf16, weightless.isa = isa;
  return {EQR_DISPATCH_TO(isa, training_workspace_bytes, shape),
          EQR_DISPATCH_TO(isa, workspace_bytes, &weightless)};
}

}  // namespace eqr::cpu
