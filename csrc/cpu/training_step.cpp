#include "cpu/training_step.h"

#include <stdexcept>

#include "cpu/packed.h"

namespace eqr::cpu {

TrainingScratch training_scratch(const Shape& shape, Isa isa) {
  // What is kept of the widest layer; with what else there is, its bytes must fit in 64 bits.
  const double kept = double(shape.L_cycles + 1) * double(shape.layers) *
                      (double(shape.tokens + 31) * double(4 * shape.hidden + shape.features) +
                       double(shape.features + 64) * double(4 * shape.mixer_hidden + shape.tokens));
  if (kept > double(int64_t{1} << 48))
    throw std::invalid_argument("sizes are too large to train: a row's activations alone would take over 2**48 values");
  Packed weightless = {};
  weightless.shape = shape, weightless.precision = Precision::bf16, weightless.isa = isa;
  return {EQR_DISPATCH_TO(isa, training_workspace_bytes, shape), EQR_DISPATCH_TO(isa, workspace_bytes, &weightless)};
}

}  // namespace eqr::cpu
