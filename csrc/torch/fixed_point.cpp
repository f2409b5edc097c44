// The whole iteration as a torch op: its schema, its arguments, and the run on CPU. fixed_point_cuda.cpp has the run on
// a CUDA device.
#include <sched.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/loop/fixed_point.h"
#include "torch/checks.h"
#include "torch/ended.h"
#include "torch/fixed_point.h"
#include "torch/fixed_point_cpu.h"
#include "torch/floating_point.h"
#include "torch/number.h"
#include "torch/packed.h"
#include "torch/polling.h"
#include "torch/text.h"

namespace eqr {
namespace {

void push_ended(void* queue, const cpu::Ended& t) { static_cast<EndedQueue*>(queue)->push(ended_trajectory(t)); }

// Torch's threads, up to twice the CPUs that this process may use: the members of a team wait for each other at every
// barrier, and with 32 on two CPUs one trajectory took ten times as long.
int worker_count() {
  const int threads = int(torch::stable::get_num_threads());
  cpu_set_t cpus;
  // It fails where there are more CPUs than a cpu_set_t holds.
  return sched_getaffinity(0, sizeof cpus, &cpus) ? threads : std::min(threads, 2 * CPU_COUNT(&cpus));
}

}  // namespace

FixedPointResult fixed_point_on_cpu(const RunArguments& run) {
  const cpu::Engine engine = cpu::checked_engine(run);
  const RunResults results(run);
  std::vector<Records> at;
  cpu::FixedPoint problem = cpu::problem_of(engine, run, results, &at);
  if (ended_queue) {
    problem.on_end = &push_ended;
    problem.on_end_context = ended_queue;
  }
  const int workers = worker_count();
  cpu::FixedPointRun team(problem, workers);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const DefaultFloatingPoint same_for_all;
    team.work(poll);
  });
  team.finish();
  return results.all();
}

namespace {

// packed: uint8 [bytes] of pack_weights; tokens: int64 [N, S], ids: int64 [N], control: int64 [3]; T = N * breadth, C
// checkpoints -> logits float32 [N, S, V], winner int64 [N], preds int64 [T, S], q_halt, residual, score float32 [T],
// steps, status int64 [T], the same six with [C, ...] at the checkpoints, residuals float32 [T, depth] or [0], the
// winners' states z_H, z_L float32 [N, S, d] or [0]. start_H, start_L: float32 [T, S, d], start_rng: int64 [T, 4], of
// all trajectories; or none of them. turn_cells: int64 [N, V, S], with turn_every; or neither.
FixedPointResult fixed_point(const Tensor& packed, const Tensor& tokens, const Tensor& ids, const Tensor& control,
                             std::vector<int64_t> sizes, std::vector<double> constants, bool fixed_start, int64_t seed,
                             int64_t breadth, int64_t depth, StringHandle halt, double tol, int64_t patience,
                             StringHandle select, int64_t window, double noise_scale, std::vector<int64_t> checkpoints,
                             int64_t slots, bool trace, std::optional<Tensor> start_H, std::optional<Tensor> start_L,
                             std::optional<Tensor> start_rng, bool keep_states, std::optional<Tensor> turn_cells,
                             int64_t turn_every) {
  const RunArguments run =
      run_arguments(packed, tokens, ids, control, sizes, constants, fixed_start, seed, breadth, depth, text_of(halt),
                    tol, patience, text_of(select), window, noise_scale, checkpoints, slots, trace, start_H, start_L,
                    start_rng, keep_states, turn_cells, turn_every);
#ifdef EQR_HAVE_CUDA
  if (place_of(tokens).cuda) return fixed_point_on_cuda(run);
#endif
  return fixed_point_on_cpu(run);
}

// packed: uint8 [bytes] -> int64 []: bytes that a trajectory in flight takes
Tensor trajectory_bytes(const Tensor& packed, int64_t window) {
  check_range("window", window, 1, (int64_t{1} << 24) - 1);
  cpu::FixedPoint problem{};
  problem.engine = cpu::engine_of(packed);
  problem.window = problem.depth = window;  // a run as deep as the window at least
  return number(packed, cpu::FixedPointRun::bytes_per_trajectory(problem));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eqr_kernels, m) {
  m.def(
      "fixed_point(Tensor packed, Tensor tokens, Tensor ids, Tensor(a!) control, int[] sizes, "
      "float[] constants, bool fixed_start, int seed, int breadth, int depth, str halt, float tol, int patience, "
      "str select, int window, float noise_scale, int[] checkpoints, int slots, bool trace, Tensor? start_H=None, "
      "Tensor? start_L=None, Tensor? start_rng=None, bool keep_states=False, Tensor? turn_cells=None, "
      "int turn_every=0) -> (Tensor logits, "
      "Tensor winner, Tensor preds, Tensor q_halt, Tensor residual, Tensor score, Tensor steps, Tensor status, "
      "Tensor at_preds, Tensor at_q_halt, Tensor at_residual, Tensor at_score, Tensor at_steps, Tensor at_status, "
      "Tensor residuals, Tensor z_H, Tensor z_L)");
  // On CUDA devices only: see fixed_point_cuda.cpp.
  m.def(
      "fixed_point_quantum(Tensor packed, Tensor tokens, Tensor ids, Tensor(a!) control, int[] sizes, "
      "float[] constants, bool fixed_start, int seed, int breadth, int depth, str halt, float tol, int patience, "
      "str select, int window, float noise_scale, int[] checkpoints, int slots, bool trace, Tensor rows, int quantum, "
      "Tensor(b!) states, Tensor(c!) parked, Tensor(d!) best, Tensor(e!)[] tables) -> ()");
  m.def("trajectory_bytes(Tensor packed, int window) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(eqr_kernels, CPU, m) {
  m.impl("fixed_point", TORCH_BOX(&fixed_point));
  m.impl("trajectory_bytes", TORCH_BOX(&trajectory_bytes));
}

#ifdef EQR_HAVE_CUDA
STABLE_TORCH_LIBRARY_IMPL(eqr_kernels, CUDA, m) { m.impl("fixed_point", TORCH_BOX(&fixed_point)); }
#endif

}  // namespace eqr
