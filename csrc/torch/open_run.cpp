// A problem that joins an open run on CPU, as a torch op: the arguments and the results of fixed_point, but the results
// are written while the run goes on. open_run_module.cpp has the run itself.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "torch/fixed_point.h"
#include "torch/fixed_point_cpu.h"
#include "torch/served_run.h"
#include "torch/text.h"

namespace eqr {
namespace {

// What a problem is read from and written to.
using Memory =
    std::tuple<Tensor, Tensor, Tensor, Tensor, std::optional<StartStates>, std::optional<TurnCells>, RunResults>;

// run: the handle of an open run; number: the caller's name of the problem there. The others as in fixed_point. The run
// keeps all tensors given and returned until it has said that the problem has ended: a caller may be interrupted before
// it has them.
FixedPointResult open_run_join(const Tensor& packed, const Tensor& tokens, const Tensor& ids, const Tensor& control,
                               std::vector<int64_t> sizes, std::vector<double> constants, bool fixed_start,
                               int64_t seed, int64_t breadth, int64_t depth, StringHandle halt, double tol,
                               int64_t patience, StringHandle select, int64_t window, double noise_scale,
                               std::vector<int64_t> checkpoints, int64_t slots, bool trace,
                               std::optional<Tensor> start_H, std::optional<Tensor> start_L,
                               std::optional<Tensor> start_rng, bool keep_states, std::optional<Tensor> turn_cells,
                               int64_t turn_every, int64_t run, int64_t number, bool steps) {
  const std::shared_ptr<ServedRun> served = ServedRun::of(run);
  const RunArguments arguments =
      run_arguments(packed, tokens, ids, control, sizes, constants, fixed_start, seed, breadth, depth, text_of(halt),
                    tol, patience, text_of(select), window, noise_scale, checkpoints, slots, trace, start_H, start_L,
                    start_rng, keep_states, turn_cells, turn_every);
  const cpu::Engine engine = cpu::checked_engine(arguments);
  const RunResults results(arguments);
  ServedRun::Guest guest{
      .joining = {},
      .checkpoints = arguments.checkpoints,
      .at = {},
      .steps = steps,
      .memory = std::make_shared<Memory>(packed, tokens, ids, control, arguments.start, arguments.turns, results)};
  guest.joining = {.problem = cpu::problem_of(engine, arguments, results, &guest.at), .number = number};
  served->join(std::move(guest), *cpu::packed_data(packed));
  return results.all();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eqr_kernels, m) {
  m.def(
      "open_run_join(Tensor packed, Tensor tokens, Tensor ids, Tensor(a!) control, int[] sizes, float[] constants, "
      "bool fixed_start, int seed, int breadth, int depth, str halt, float tol, int patience, str select, int window, "
      "float noise_scale, int[] checkpoints, int slots, bool trace, Tensor? start_H, Tensor? start_L, "
      "Tensor? start_rng, bool keep_states, Tensor? turn_cells, int turn_every, int run, int number, "
      "bool steps) -> (Tensor logits, "
      "Tensor winner, Tensor preds, Tensor q_halt, Tensor residual, Tensor score, Tensor steps, Tensor status, "
      "Tensor at_preds, Tensor at_q_halt, Tensor at_residual, Tensor at_score, Tensor at_steps, Tensor at_status, "
      "Tensor residuals, Tensor z_H, Tensor z_L)");
}

STABLE_TORCH_LIBRARY_IMPL(eqr_kernels, CPU, m) { m.impl("open_run_join", TORCH_BOX(&open_run_join)); }

}  // namespace eqr
