// The packing of weights as a torch op: its schema, its arguments, and the packing on CPU. pack_weights_cuda.cpp has
// the packing on a CUDA device.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/operator.h"
#include "torch/checks.h"
#include "torch/floating_point.h"
#include "torch/pack_weights.h"
#include "torch/packed.h"
#include "torch/text.h"

namespace eqr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor pack_on_cpu(const OperatorTensors& given) {
  const Shape& s = given.shape;
  constexpr int64_t kMostSummed = 65536;  // products of two bytes, in an int32
  if (given.precision == Precision::int8 && (s.hidden > kMostSummed || s.features > kMostSummed))
    fail("precision 'int8' needs features and hidden of at most ", kMostSummed, ", got ", s.features, " and ", s.hidden,
         "; use 'bf16'");
  const DefaultFloatingPoint same_for_all;
  const cpu::Isa isa = cpu::isa();
  // Zeros, so that what lies between the parts is the same each time.
  Tensor packed =
      torch::stable::new_zeros(given.embedding, {cpu::packed_bytes(s, given.precision, isa)}, ScalarType::Byte);
  cpu::packed_data(packed);
  cpu::pack(s, given.precision, isa, given.weights(), static_cast<cpu::Packed*>(packed.mutable_data_ptr()));
  return packed;
}

namespace {

// all tensors float32 -> uint8 [bytes]; layout: on a CUDA device the kernel that is to read them
Tensor pack_weights(const Tensor& embedding, const Tensor& lm_head, const Tensor& q_weight, const Tensor& q_bias,
                    const std::vector<Tensor>& blocks, std::optional<Tensor> rope_cos, std::optional<Tensor> rope_sin,
                    std::optional<Tensor> H_start, std::optional<Tensor> L_start, std::vector<int64_t> sizes,
                    std::vector<double> constants, StringHandle precision, StringHandle layout) {
  [[maybe_unused]] const std::string reader = text_of(layout);
  const OperatorTensors given = operator_tensors(embedding, lm_head, q_weight, q_bias, blocks, rope_cos, rope_sin,
                                                 H_start, L_start, sizes, constants, precision_of(text_of(precision)));
#ifdef EQR_HAVE_CUDA
  if (place_of(embedding).cuda) return pack_on_cuda(given, reader);
#endif
  return pack_on_cpu(given);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eqr_kernels, m) {
  m.def(
      "pack_weights(Tensor embedding, Tensor lm_head, Tensor q_weight, Tensor q_bias, Tensor[] blocks, "
      "Tensor? rope_cos, Tensor? rope_sin, Tensor? H_start, Tensor? L_start, int[] sizes, float[] constants, "
      "str precision, str layout=\"\") -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(eqr_kernels, CPU, m) { m.impl("pack_weights", TORCH_BOX(&pack_weights)); }

#ifdef EQR_HAVE_CUDA
STABLE_TORCH_LIBRARY_IMPL(eqr_kernels, CUDA, m) { m.impl("pack_weights", TORCH_BOX(&pack_weights)); }
#endif

}  // namespace eqr
