// A fixed-point run of a CUDA kernel's body on the host.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/problem.h"
#include "emulator.h"

namespace eqr::test {

// The kernels, by the stems of their files.
std::vector<std::string> kernels();

struct KernelRun {
  std::string kernel = "throughput_mma";
  int64_t slots = 2;    // trajectories in flight: CTAs, but of the latency kernel, which has one
  int ctas = 3;         // of the latency kernel
  int cluster = 1;      // of throughput_wgmma: slots is a multiple
  uint64_t seed = 0;    // of the schedule
  int64_t quantum = 0;  // outer steps of a trajectory in a launch; 0: one launch takes each to its end
};

// Runs `problem`, whose shape, tokens, rules and outputs the caller has set; layout, weights and scratch are made here.
// In quanta each launch takes some of the trajectories that go on, in another order each time.
// Throws emu::Error, and std::invalid_argument for an unknown kernel or features that it is not made for.
void run_kernel(const KernelRun& how, const OperatorWeights& weights, cuda::Problem problem);

}  // namespace eqr::test
