// The CUDA kernels as the rest of the library sees them: torch-free, on the current device, in the order of a stream.
// Nothing here waits for the device, and all of it may be captured in a CUDA graph.
#pragma once

#include <stdint.h>

#include <string>

#include "cuda/problem.h"

typedef struct CUstream_st* cudaStream_t;

namespace eqr::cuda {

// throughput: a trajectory in each CTA and a queue; latency: the whole device on one trajectory at a time.
enum class Regime : int32_t { automatic, throughput, latency };

struct DeviceLimits {
  int major, minor;  // compute capability
  int multiprocessors;
  int64_t shared_bytes;  // that a CTA may have
};

// How a run is launched.
struct Plan {
  enum class Kernel : int32_t { throughput_mma, throughput_wgmma, latency };
  Kernel kernel;
  int ctas, threads, cluster;
  int64_t shared_bytes;
  int64_t slots;  // trajectories in flight
  int64_t slot_bytes;
  int64_t work_bytes;       // besides the slots
  int64_t workspace_bytes;  // of the device's memory, at a multiple of 256 bytes
};

const char* kernel_name(Plan::Kernel);

// Why the kernels do not take an operator, or empty. Needs no device.
std::string why_not(const Shape&, Precision);

// Of a device, by cudaGetDeviceAttribute. Throws std::runtime_error.
DeviceLimits device_limits(int device);

// Throws std::invalid_argument where why_not(...) is not empty or the device cannot run it. At most `slots`
// trajectories are in flight: a CTA's each, in the latency regime one.
Plan plan(const Shape&, const DeviceLimits&, Regime, int64_t trajectories, int64_t slots, int64_t window, int64_t depth,
          int64_t puzzles, bool race);

// Bytes of the packed weights, the same for every plan; and the packing of weights (all of the device, but the array
// `blocks` itself) for the kernel that reads them.
int64_t packed_bytes(const Shape&);
void pack(const Shape&, Plan::Kernel, const OperatorWeights&, void* packed, cudaStream_t);

// Fills in the problem's layout, slots, counters and best from the plan and the workspace, and runs it. `Problem::end`
// and the rest are written when the stream gets there.
void launch(Problem, const Plan&, void* workspace, cudaStream_t);

// As `launch`, but of the `count` trajectories of `rows`, for `quantum` outer steps each at most, see problem.h. The
// caller has set these three, and what stays on the device from launch to launch: `slots`, slot_bytes of the plan for
// each trajectory; `parked`, parked_bytes() for each; in a race `best`; and the outputs, where a trajectory's are
// written as it stands when the launch leaves it, its status kGoing where it goes on. The plan is for the trajectories
// of the launch; its kernel is the same for all launches.
void launch_quantum(Problem, const Plan&, void* workspace, cudaStream_t);
int64_t parked_bytes();
int64_t quantum_workspace_bytes(const Plan&);

// Which of a puzzle's trajectories is its answer, by the problem's rule, after `launch` on the same stream. winner:
// [N]; logits: [N, S, V], the winners' of the problem's [T, S, V]. ballots: [T], scratch.
void select_winners(const Problem&, int64_t* winner, float* logits, int64_t* ballots, cudaStream_t);

}  // namespace eqr::cuda
