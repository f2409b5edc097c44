// The kernels on the host as a C function, for tests/support/emulated_cuda.py.
#include <cstring>
#include <exception>
#include <string>

#include "kernel_run.h"
#include "torch/operator_args.h"

namespace {

thread_local std::string error;

}  // namespace

extern "C" {

// sizes and constants as in csrc/torch/operator_args.h; weights: embedding, lm_head, q_weight, q_bias, H_start, L_start
// (or null), then 4 a layer; rules: puzzles, breadth, depth, seed, halt, patience, race, window; how: slots, ctas,
// cluster, seed of the schedule, quantum; end and at: preds, q_halt, residual, score, steps, status. Null, or what went
// wrong.
__attribute__((visibility("default"))) const char* eqr_emulated_fixed_point(
    const char* kernel, const int64_t* sizes /* [10] */, const double* constants /* [4] */, float** weights,
    const int64_t* tokens, const int64_t* ids, const int64_t* rules /* [8] */, double tol, double noise_scale,
    const int64_t* checkpoints, int64_t checkpoint_count, void** end /* [6] */, void** at /* [6] */, float* logits,
    float* residuals, int64_t* control, const int64_t* how /* [5] */) {
  using namespace eqr;
  try {
    cuda::Problem p = {};
    p.shape = shape_of({sizes, sizes + 10}, {constants, constants + 4}, weights[4] != nullptr);
    std::vector<BlockWeights> blocks;
    for (int64_t i = 0; i < p.shape.layers; ++i) {
      float** block = weights + 6 + 4 * i;
      blocks.push_back({block[0], block[1], block[2], block[3]});
    }
    const OperatorWeights all = {weights[0], weights[1], weights[2], weights[3], blocks.data(),
                                 nullptr,    nullptr,    weights[4], weights[5]};
    const auto records = [](void** of) {
      return Records{static_cast<int64_t*>(of[0]), static_cast<float*>(of[1]),   static_cast<float*>(of[2]),
                     static_cast<float*>(of[3]),   static_cast<int64_t*>(of[4]), static_cast<int64_t*>(of[5])};
    };
    p.tokens = tokens, p.ids = ids;
    p.puzzles = rules[0], p.breadth = rules[1], p.depth = rules[2], p.seed = rules[3];
    p.halt = Halt(rules[4]), p.patience = rules[5], p.select = rules[6] ? Select::first : Select::residual,
    p.window = rules[7];
    p.tol = float(tol), p.noise_scale = float(noise_scale);
    p.checkpoint_count = int32_t(checkpoint_count);
    for (int64_t i = 0; i < checkpoint_count; ++i) p.checkpoints[i] = int32_t(checkpoints[i]);
    p.end = records(end), p.at = records(at);
    p.logits = logits, p.residuals = residuals, p.control = control;
    test::run_kernel({kernel, how[0], int(how[1]), int(how[2]), uint64_t(how[3]), how[4]}, all, p);
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}
}
