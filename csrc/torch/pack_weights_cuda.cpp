// The packing of weights on a CUDA device, in the order of torch's current stream; nothing here waits for it.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>

#include "cuda/launch.h"
#include "torch/cuda_args.h"
#include "torch/cuda_device.h"
#include "torch/pack_weights.h"

namespace eqr {

torch::stable::Tensor pack_on_cuda(const OperatorTensors& given, const std::string& layout) {
  check_taken(given.shape, given.precision);
  const cuda::Plan::Kernel kernel = cuda::kernel_of_layout(layout);
  const On device(place_of(given.embedding));
  // Zeros, so that what lies between the parts is the same each time.
  torch::stable::Tensor packed = torch::stable::new_zeros(given.embedding, {cuda::packed_length(given.shape, kernel)},
                                                          torch::headeronly::ScalarType::Byte);
  cuda::pack(given.shape, kernel, given.weights(), packed.mutable_data_ptr(), device.stream());
  return packed;
}

}  // namespace eqr
