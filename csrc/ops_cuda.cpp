// pack_weights and fixed_point on a CUDA device, in the order of torch's current stream; nothing here waits for it.
// Schemas are in ops_fixed_point.cpp.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/runtime.h"
#include "cuda_args.h"
#include "ops_checks.h"
#include "ops_fixed_point.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using eqr::check_tensor;
using eqr::fail;
using eqr::Place;
using eqr::place_of;
using eqr::shape;

// torch's current device and stream are those of `place`, for torch's copy of the CUDA runtime and for ours.
class On {
 public:
  explicit On(const Place& place) : guard_(place.index) {
    eqr::cuda::use_device(place.index);
    // Of a library that a torch without CUDA lacks, and that Python loads locally: so by name, when it is needed.
    using Current = int32_t (*)(int32_t, void**);
    static const Current current = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
      return library ? reinterpret_cast<Current>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    void* stream = nullptr;
    if (!current || current(place.index, &stream) != 0)
      throw std::runtime_error("torch does not tell its current stream on " + place.name() +
                               "; use a torch with CUDA, or backend='reference'");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

Place cuda_place(const char* name, const Tensor& t) {
  const Place place = place_of(t);
  if (!place.cuda) fail(name, " is on CPU and other arguments are on a CUDA device; move them all to one device");
  return place;
}

void check_operator(const eqr::Shape& s, eqr::Precision precision) {
  if (const std::string why = eqr::cuda::why_not(s, precision); !why.empty()) fail(why);
}

// all tensors float32 -> uint8 [bytes]; layout: the kernel that is to read it
Tensor pack_weights(const Tensor& embedding, const Tensor& lm_head, const Tensor& q_weight, const Tensor& q_bias,
                    const std::vector<Tensor>& blocks, std::optional<Tensor> rope_cos, std::optional<Tensor> rope_sin,
                    std::optional<Tensor> H_start, std::optional<Tensor> L_start, std::vector<int64_t> sizes,
                    std::vector<double> constants, std::string precision, std::string layout) {
  const Place place = cuda_place("embedding", embedding);
  eqr::OperatorTensors given = eqr::operator_tensors(embedding, lm_head, q_weight, q_bias, blocks, rope_cos, rope_sin,
                                                     H_start, L_start, sizes, constants, precision);
  given.weights.blocks = given.layers.data();
  check_operator(given.shape, given.precision);
  const eqr::cuda::Plan::Kernel kernel = eqr::cuda::kernel_of_layout(layout);
  const On device(place);
  // Zeros, so that what lies between the parts is the same each time.
  Tensor packed =
      torch::stable::new_zeros(embedding, {eqr::cuda::packed_length(given.shape, kernel)}, ScalarType::Byte);
  eqr::cuda::pack(given.shape, kernel, given.weights, packed.mutable_data_ptr(), device.stream());
  return packed;
}

const char* packed_data(const Tensor& packed, const Place& place) {
  check_tensor("packed", packed, ScalarType::Byte, {packed.dim() == 1 ? packed.size(0) : 0}, place);
  const void* data = packed.const_data_ptr();
  if (reinterpret_cast<uintptr_t>(data) % 128)
    fail("packed must lie at a multiple of 128 bytes, and this view of it does not; use packed.clone()");
  return static_cast<const char*>(data);
}

// int64 [3]: of the host, for who wants to look at it or cancel meanwhile, or of the device.
int64_t* control_data(const Tensor& control, const Place& place) {
  const bool on_device = control.is_cuda();
  check_tensor("control", control, ScalarType::Long, {3}, on_device ? place : Place{});
  int64_t* const data = control.mutable_data_ptr<int64_t>();
  int64_t* const seen = on_device ? data : eqr::cuda::device_view(data);
  if (!seen)
    fail(
        "control must be in page-locked memory, which the device sees too, and it is in plain memory; make it with "
        "torch.zeros(3, dtype=torch.int64, pin_memory=True), or on ",
        place.name(), " where nobody looks at it meanwhile");
  return seen;
}

eqr::cuda::Plan plan_for(const eqr::Shape& s, int64_t packed_length, const Place& place, const eqr::RunArguments& run) {
  using namespace eqr::cuda;
  const Plan::Kernel kernel = kernel_of_length(s, packed_length);
  const Regime regime = kernel == Plan::Kernel::latency ? Regime::latency : Regime::throughput;
  const Plan out = plan(s, device_limits(place.index), regime, run.trajectories(), run.slots, run.window, run.depth,
                        run.puzzles(), run.select == eqr::Select::first);
  if (out.kernel != kernel)
    fail("packed has the layout of ", kernel_name(kernel), ", and on ", place.name(), " runs ", kernel_name(out.kernel),
         "; pack the weights with layout='", kernel_name(out.kernel), "'");
  return out;
}

// As the CPU's; packed of `pack_weights` on the same device; control: int64 [3], page-locked or on the device
eqr::FixedPointResult fixed_point(const Tensor& packed, const Tensor& tokens, const Tensor& ids, const Tensor& control,
                                  std::vector<int64_t> sizes, std::vector<double> constants, bool fixed_start,
                                  int64_t seed, int64_t breadth, int64_t depth, std::string halt, double tol,
                                  int64_t patience, std::string select, int64_t window, double noise_scale,
                                  std::vector<int64_t> checkpoints, int64_t slots, bool trace) {
  const eqr::Shape s = eqr::shape_of(sizes, constants, fixed_start);
  check_operator(s, eqr::Precision::bf16);
  const Place place = cuda_place("tokens", tokens);
  const char* const weights = packed_data(packed, place);
  const eqr::RunArguments run(tokens, ids, s, seed, breadth, depth, halt, tol, patience, select, window, noise_scale,
                              checkpoints, slots);
  if (checkpoints.size() > size_t(eqr::cuda::kMostCheckpoints))
    fail("checkpoints must be at most ", eqr::cuda::kMostCheckpoints, " on a CUDA device, got ", checkpoints.size(),
         "; leave some to another run, or use backend='triton' or backend='reference'");
  const On device(place);
  int64_t* const seen = control_data(control, place);
  const eqr::cuda::Plan plan = plan_for(s, packed.numel(), place, run);

  const int64_t T = run.trajectories(), S = s.tokens, V = s.vocabulary;
  const eqr::RunResults results(run, s, trace);
  if (T == 0) return results.all();
  const Tensor all_logits = torch::stable::new_empty(tokens, {T, S, V}, ScalarType::Float);
  const Tensor votes = torch::stable::new_empty(tokens, {run.select == eqr::Select::vote ? T : 0}, ScalarType::Long);
  const Tensor workspace = torch::stable::new_empty(tokens, {plan.workspace_bytes}, ScalarType::Byte);
  eqr::cuda::Problem p{};
  p.shape = s;
  p.packed = weights;
  p.puzzles = run.puzzles();
  p.breadth = breadth;
  p.depth = depth;
  p.tokens = tokens.const_data_ptr<int64_t>();
  p.ids = ids.const_data_ptr<int64_t>();
  p.seed = seed;
  p.halt = run.halt;
  p.tol = float(tol);
  p.patience = patience;
  p.race = run.select == eqr::Select::first;
  p.window = std::min(window, depth);  // an older difference does not exist
  p.noise_scale = float(noise_scale);
  p.checkpoint_count = int32_t(checkpoints.size());
  std::copy(checkpoints.begin(), checkpoints.end(), p.checkpoints);
  p.end = results.end.records(0, T, S);
  p.at = results.at.records(0, T, S);
  p.logits = all_logits.mutable_data_ptr<float>();
  p.residuals = trace ? results.residuals.mutable_data_ptr<float>() : nullptr;
  p.control = seen;
  // Memory that ends with this function serves the stream's next work, and not before.
  eqr::cuda::launch(p, plan, workspace.mutable_data_ptr(), device.stream());
  eqr::cuda::select_winners(p, run.select, results.winner.mutable_data_ptr<int64_t>(),
                            results.logits.mutable_data_ptr<float>(), votes.mutable_data_ptr<int64_t>(),
                            device.stream());
  return results.all();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eqr_kernels, CUDA, m) {
  m.impl("pack_weights", TORCH_BOX(&pack_weights));
  m.impl("fixed_point", TORCH_BOX(&fixed_point));
}
