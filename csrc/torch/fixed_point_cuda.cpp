// The whole iteration on a CUDA device, in the order of torch's current stream; nothing here waits for it.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/runtime.h"
#include "torch/checks.h"
#include "torch/cuda_args.h"
#include "torch/cuda_device.h"
#include "torch/fixed_point.h"

namespace eqr {
namespace {

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
  int64_t* const seen = on_device ? data : cuda::device_view(data);
  if (!seen)
    fail(
        "control must be in page-locked memory, which the device sees too, and it is in plain memory; make it with "
        "torch.zeros(3, dtype=torch.int64, pin_memory=True), or on ",
        place.name(), " where nobody looks at it meanwhile");
  return seen;
}

cuda::Plan plan_for(const RunArguments& run, const Place& place) {
  using cuda::kernel_name;
  const cuda::Plan::Kernel kernel = cuda::kernel_of_length(run.shape, run.packed.numel());
  const cuda::Regime regime = kernel == cuda::Plan::Kernel::latency ? cuda::Regime::latency : cuda::Regime::throughput;
  const cuda::Plan out = cuda::plan(run.shape, cuda::device_limits(place.index), regime, run.trajectories(), run.slots,
                                    run.rules.window, run.rules.depth, run.puzzles(), is_race(run.rules));
  if (out.kernel != kernel)
    fail("packed has the layout of ", kernel_name(kernel), ", and on ", place.name(), " runs ", kernel_name(out.kernel),
         "; pack the weights with layout='", kernel_name(out.kernel), "'");
  return out;
}

}  // namespace

FixedPointResult fixed_point_on_cuda(const RunArguments& run) {
  check_taken(run.shape, Precision::bf16);
  const Place place = place_of(run.tokens);
  const char* const weights = packed_data(run.packed, place);
  run.check();
  if (run.checkpoints.size() > size_t(cuda::kMostCheckpoints))
    fail("checkpoints must be at most ", cuda::kMostCheckpoints, " on a CUDA device, got ", run.checkpoints.size(),
         "; leave some to another run, or use backend='triton' or backend='reference'");
  if (run.start || run.keep_states)
    fail("start_H and keep_states are for runs on CPU, and tokens are on ", place.name());
  const On device(place);
  int64_t* const seen = control_data(run.control, place);
  const cuda::Plan plan = plan_for(run, place);

  const int64_t T = run.trajectories(), S = run.shape.tokens, V = run.shape.vocabulary;
  const RunResults results(run);
  if (T == 0) return results.all();
  const Tensor all_logits = torch::stable::new_empty(run.tokens, {T, S, V}, ScalarType::Float);
  const bool vote = run.rules.select == Select::vote;
  const Tensor ballots = torch::stable::new_empty(run.tokens, {vote ? T : 0}, ScalarType::Long);
  const Tensor workspace = torch::stable::new_empty(run.tokens, {plan.workspace_bytes}, ScalarType::Byte);
  cuda::Problem p(run.rules);
  p.window = std::min(run.rules.window, run.rules.depth);  // an older difference does not exist
  p.shape = run.shape;
  p.packed = weights;
  p.puzzles = run.puzzles();
  p.tokens = run.tokens.const_data_ptr<int64_t>();
  p.ids = run.ids.const_data_ptr<int64_t>();
  p.checkpoint_count = int32_t(run.checkpoints.size());
  std::copy(run.checkpoints.begin(), run.checkpoints.end(), p.checkpoints);
  p.end = results.end.records(0, T, S);
  p.at = results.at.records(0, T, S);
  p.logits = all_logits.mutable_data_ptr<float>();
  p.residuals = run.trace ? results.residuals.mutable_data_ptr<float>() : nullptr;
  p.control = seen;
  // Memory that ends with this function serves the stream's next work, and not before.
  cuda::launch(p, plan, workspace.mutable_data_ptr(), device.stream());
  cuda::select_winners(p, results.winner.mutable_data_ptr<int64_t>(), results.logits.mutable_data_ptr<float>(),
                       ballots.mutable_data_ptr<int64_t>(), device.stream());
  return results.all();
}

}  // namespace eqr
