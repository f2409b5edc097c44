// Each kernel under every schedule and lateness, with races in shared memory searched for: the same bits each time, and
// what the operator in double precision gives but for bf16. tests/cuda/test_cuda_kernels.py has the rest.
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "kernel_run.h"
#include "operator_oracle.h"
#include "samples.h"

namespace eqr::test {
namespace {

Shape small_shape(int64_t layers) { return mlp_shape(9, 128, 5, layers); }

struct Outcome {
  std::vector<int64_t> preds, steps, status;
  std::vector<float> q_halt, residual, score, logits;

  bool operator==(const Outcome& other) const {
    const auto same = [](const auto& a, const auto& b) {
      return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0]));
    };
    return same(preds, other.preds) && same(steps, other.steps) && same(status, other.status) &&
           same(q_halt, other.q_halt) && same(residual, other.residual) && same(score, other.score) &&
           same(logits, other.logits);
  }
};

struct Case {
  RandomModel model;
  int64_t puzzles = 3, depth = 1;
  std::vector<int64_t> tokens, ids;

  explicit Case(const Shape& shape) : model(shape, 3) {
    for (int64_t i = 0; i < puzzles * shape.tokens; ++i) tokens.push_back((i * 7 + i / 9) % shape.vocabulary);
    for (int64_t i = 0; i < puzzles; ++i) ids.push_back(i * 1000003 - 5);
  }

  Outcome run(const KernelRun& how) const {
    const size_t T = size_t(puzzles), S = size_t(model.shape.tokens), V = size_t(model.shape.vocabulary);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    Outcome out = {std::vector<int64_t>(T * S, -9),   std::vector<int64_t>(T, -9), std::vector<int64_t>(T, -9),
                   std::vector<float>(T, nan),        std::vector<float>(T, nan),  std::vector<float>(T, nan),
                   std::vector<float>(T * S * V, nan)};
    cuda::Problem p = {};
    p.shape = model.shape;
    p.puzzles = puzzles, p.breadth = 1, p.depth = depth, p.seed = 5;
    p.tokens = tokens.data(), p.ids = ids.data();
    p.halt = Halt::none, p.patience = 1, p.window = 2, p.noise_scale = 0.1f;
    p.end = {out.preds.data(), out.q_halt.data(), out.residual.data(),
             out.score.data(), out.steps.data(),  out.status.data()};
    p.logits = out.logits.data();
    int64_t control[3] = {0, 0, 0};
    p.control = control;
    run_kernel(how, model.weights(), p);
    CHECK(control[1] == puzzles && control[2] == puzzles * depth, control[1], control[2]);
    return out;
  }

  // Relative to the oracle's logits after the first outer step.
  double error(const Outcome& out) const {
    double wrong = 0, all = 0;
    for (int64_t n = 0; n < puzzles; ++n) {
      const cpu::StepInput in = {tokens.data() + n * model.shape.tokens, {5, 0, ids[size_t(n)], 0}, 0.1f};
      OracleState state = oracle_start(model, in);
      oracle_outer_step(model, in, state);
      for (size_t i = 0; i < state.logits.size(); ++i) {
        const double got = double(out.logits[size_t(n) * state.logits.size() + i]);
        wrong += std::pow(got - state.logits[i], 2), all += std::pow(state.logits[i], 2);
      }
    }
    return std::sqrt(wrong / all);
  }
};

void under_every_schedule(KernelRun how, int64_t layers) {
  const Case test(small_shape(layers));
  const Outcome first = test.run(how);
  const double error = test.error(first);
  CHECK(error < 0.03, how.kernel, error);
  for (how.seed = 1; how.seed < uint64_t(emu::kSeeds); ++how.seed) CHECK(test.run(how) == first, how.kernel, how.seed);
}

TEST(throughput_mma_under_every_schedule) { under_every_schedule({.kernel = "throughput_mma", .slots = 2}, 2); }

TEST(throughput_wgmma_under_every_schedule) {
  under_every_schedule({.kernel = "throughput_wgmma", .slots = 2, .cluster = 2}, 1);
}

TEST(throughput_wgmma_without_a_cluster_under_every_schedule) {
  under_every_schedule({.kernel = "throughput_wgmma", .slots = 2}, 2);
}

TEST(latency_under_every_schedule) { under_every_schedule({.kernel = "latency", .ctas = 3}, 2); }

TEST(all_throughput_kernels_give_the_same) {
  const Case test(small_shape(2));
  const Outcome mma = test.run({.kernel = "throughput_mma"}), wgmma = test.run({.kernel = "throughput_wgmma"});
  CHECK(mma == wgmma);
}

TEST(quanta_give_the_bits_of_one_launch) {
  Case test(small_shape(1));
  test.depth = 2;
  for (const std::string& kernel : kernels())
    CHECK(test.run({.kernel = kernel, .quantum = 1}) == test.run({.kernel = kernel}), kernel);
}

TEST(an_unknown_kernel_is_refused) {
  const Case test(small_shape(1));
  bool refused = false;
  try {
    test.run({.kernel = "fastest"});
  } catch (const std::invalid_argument& e) {
    refused = std::string(e.what()).find("fastest") != std::string::npos;
  }
  CHECK(refused);
}

}  // namespace
}  // namespace eqr::test
