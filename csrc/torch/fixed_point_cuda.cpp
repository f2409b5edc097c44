// The whole iteration on a CUDA device, in the order of torch's current stream; nothing here waits for it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/runtime.h"
#include "torch/checks.h"
#include "torch/cuda_args.h"
#include "torch/cuda_device.h"
#include "torch/fixed_point.h"
#include "torch/text.h"

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

// Of `trajectories` of the run, of which at most `slots` are in flight.
cuda::Plan plan_for(const RunArguments& run, int64_t trajectories, int64_t slots, const Place& place) {
  using cuda::kernel_name;
  const cuda::Plan::Kernel kernel = cuda::kernel_of_length(run.shape, run.packed.numel());
  const cuda::Regime regime = kernel == cuda::Plan::Kernel::latency ? cuda::Regime::latency : cuda::Regime::throughput;
  const cuda::Plan out = cuda::plan(run.shape, cuda::device_limits(place.index), regime, trajectories, slots,
                                    run.rules.window, run.rules.depth, run.puzzles(), is_race(run.rules));
  if (out.kernel != kernel)
    fail("packed has the layout of ", kernel_name(kernel), ", and on ", place.name(), " runs ", kernel_name(out.kernel),
         "; pack the weights with layout='", kernel_name(out.kernel), "'");
  return out;
}

// The run but for its memory. All arguments are checked but `control`.
cuda::Problem problem_of(const RunArguments& run, const Place& place) {
  check_taken(run.shape, Precision::bf16);
  cuda::Problem p(run.rules);
  p.packed = packed_data(run.packed, place);
  run.check();
  if (run.checkpoints.size() > size_t(cuda::kMostCheckpoints))
    fail("checkpoints must be at most ", cuda::kMostCheckpoints, " on a CUDA device, got ", run.checkpoints.size(),
         "; leave some to another run, or use backend='triton' or backend='reference'");
  if (run.start || run.keep_states || run.turns)
    fail("start_H, keep_states and turn_cells are for runs on CPU, and tokens are on ", place.name());
  p.window = std::min(run.rules.window, run.rules.depth);  // an older difference does not exist
  p.shape = run.shape;
  p.puzzles = run.puzzles();
  p.tokens = run.tokens.const_data_ptr<int64_t>();
  p.ids = run.ids.const_data_ptr<int64_t>();
  p.checkpoint_count = int32_t(run.checkpoints.size());
  std::copy(run.checkpoints.begin(), run.checkpoints.end(), p.checkpoints);
  return p;
}

template <class T>
T* checked(const char* name, const Tensor& tensor, ScalarType dtype, const std::vector<int64_t>& sizes,
           const Place& place) {
  check_tensor(name, tensor, dtype, sizes, place);
  return tensor.mutable_data_ptr<T>();
}

}  // namespace

FixedPointResult fixed_point_on_cuda(const RunArguments& run) {
  const Place place = place_of(run.tokens);
  cuda::Problem p = problem_of(run, place);
  const On device(place);
  p.control = control_data(run.control, place);
  const cuda::Plan plan = plan_for(run, run.trajectories(), run.slots, place);

  const int64_t T = run.trajectories(), S = run.shape.tokens, V = run.shape.vocabulary;
  const RunResults results(run);
  if (T == 0) return results.all();
  const Tensor all_logits = torch::stable::new_empty(run.tokens, {T, S, V}, ScalarType::Float);
  const bool vote = run.rules.select == Select::vote;
  const Tensor ballots = torch::stable::new_empty(run.tokens, {vote ? T : 0}, ScalarType::Long);
  const Tensor workspace = torch::stable::new_empty(run.tokens, {plan.workspace_bytes}, ScalarType::Byte);
  p.end = results.end.records(0, T, S);
  p.at = results.at.records(0, T, S);
  p.logits = all_logits.mutable_data_ptr<float>();
  p.residuals = run.trace ? results.residuals.mutable_data_ptr<float>() : nullptr;
  // Memory that ends with this function serves the stream's next work, and not before.
  cuda::launch(p, plan, workspace.mutable_data_ptr(), device.stream());
  cuda::select_winners(p, results.winner.mutable_data_ptr<int64_t>(), results.logits.mutable_data_ptr<float>(),
                       ballots.mutable_data_ptr<int64_t>(), device.stream());
  return results.all();
}

namespace {

// The arguments up to `trace` are those of fixed_point, of T = N * breadth trajectories; what follows stays on the
// device from launch to launch, but `rows`, int64 [R]: which trajectories go on, each for at most `quantum` outer
// steps. states: uint8 [T * slot_bytes]; parked: int64 [T, words], zeros where none has begun; best: int64 [N] in a
// race, -1 before, or [0]; tables: preds int64 [C + 1, T, S], q_halt, residual, score float32 [C + 1, T], steps, status
// int64 [C + 1, T], the last row as they stand, logits float32 [T, S, V], residuals float32 [T, depth] or [0].
void fixed_point_quantum(const Tensor& packed, const Tensor& tokens, const Tensor& ids, const Tensor& control,
                         std::vector<int64_t> sizes, std::vector<double> constants, bool fixed_start, int64_t seed,
                         int64_t breadth, int64_t depth, StringHandle halt, double tol, int64_t patience,
                         StringHandle select, int64_t window, double noise_scale, std::vector<int64_t> checkpoints,
                         int64_t slots, bool trace, const Tensor& rows, int64_t quantum, const Tensor& states,
                         const Tensor& parked, const Tensor& best, std::vector<Tensor> tables) {
  const RunArguments run =
      run_arguments(packed, tokens, ids, control, sizes, constants, fixed_start, seed, breadth, depth, text_of(halt),
                    tol, patience, text_of(select), window, noise_scale, checkpoints, slots, trace, std::nullopt,
                    std::nullopt, std::nullopt, false, std::nullopt, 0);
  const Place place = place_of(tokens);
  cuda::Problem p = problem_of(run, place);
  check_range("quantum", quantum, 1, (int64_t{1} << 24) - 1);
  p.count = rows.dim() == 1 ? rows.size(0) : 0;
  p.rows = checked<int64_t>("rows", rows, ScalarType::Long, {p.count}, place);
  p.quantum = quantum;
  const int64_t T = run.trajectories(), S = run.shape.tokens, V = run.shape.vocabulary;
  const int64_t C = int64_t(run.checkpoints.size()), words = cuda::parked_bytes() / int64_t{sizeof(int64_t)};
  const On device(place);
  p.control = control_data(control, place);
  if (p.count == 0) return;
  const cuda::Plan plan = plan_for(run, p.count, p.count, place);
  p.slots = reinterpret_cast<char*>(checked<uint8_t>("states", states, ScalarType::Byte, {T * plan.slot_bytes}, place));
  p.parked = reinterpret_cast<cuda::Control*>(checked<int64_t>("parked", parked, ScalarType::Long, {T, words}, place));
  const bool race = is_race(run.rules);
  auto* const first = checked<int64_t>("best", best, ScalarType::Long, {race ? run.puzzles() : 0}, place);
  p.best = race ? reinterpret_cast<uint64_t*>(first) : nullptr;
  if (tables.size() != 8) fail("tables must be 8 tensors, got ", tables.size());
  const Records all = {.preds = checked<int64_t>("tables[0]", tables[0], ScalarType::Long, {C + 1, T, S}, place),
                       .q_halt = checked<float>("tables[1]", tables[1], ScalarType::Float, {C + 1, T}, place),
                       .residual = checked<float>("tables[2]", tables[2], ScalarType::Float, {C + 1, T}, place),
                       .score = checked<float>("tables[3]", tables[3], ScalarType::Float, {C + 1, T}, place),
                       .steps = checked<int64_t>("tables[4]", tables[4], ScalarType::Long, {C + 1, T}, place),
                       .status = checked<int64_t>("tables[5]", tables[5], ScalarType::Long, {C + 1, T}, place)};
  p.at = all;
  p.end = {.preds = all.preds + C * T * S,
           .q_halt = all.q_halt + C * T,
           .residual = all.residual + C * T,
           .score = all.score + C * T,
           .steps = all.steps + C * T,
           .status = all.status + C * T};
  p.logits = checked<float>("tables[6]", tables[6], ScalarType::Float, {T, S, V}, place);
  const std::vector<int64_t> traced = trace ? std::vector{T, depth} : std::vector{int64_t{0}};
  auto* const residuals = checked<float>("tables[7]", tables[7], ScalarType::Float, traced, place);
  p.residuals = trace ? residuals : nullptr;
  const Tensor workspace = torch::stable::new_empty(tokens, {cuda::quantum_workspace_bytes(plan)}, ScalarType::Byte);
  cuda::launch_quantum(p, plan, workspace.mutable_data_ptr(), device.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eqr_kernels, CUDA, m) { m.impl("fixed_point_quantum", TORCH_BOX(&fixed_point_quantum)); }

}  // namespace eqr
