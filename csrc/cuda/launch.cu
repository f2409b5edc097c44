// How a run is launched, and the launching. Host code; the kernels are in the other files.
#include "cuda/launch.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/check.h"
#include "cuda/kernels.h"
#include "cuda/runtime.h"
#include "cuda/trajectory.h"

namespace eqr::cuda {
namespace {

// A few trajectories leave most of the device idle when each has a CTA. Where the regimes really meet is not measured.
constexpr int64_t kMostForLatency = 8;
constexpr int64_t kAlign = 256;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::string all;
  const auto add = [&](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>)
      all += std::to_string(part);
    else
      all += part;
  };
  (add(parts), ...);
  return all;
}

int64_t padded(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// The workspace: slots, scratch, counters, and in a race the best of each puzzle.
struct Workspace {
  int64_t work, counters, best, bytes;

  Workspace(int64_t slots, const Plan& plan, int64_t puzzles, bool race)
      : work(padded(slots * plan.slot_bytes)),
        counters(work + padded(plan.work_bytes)),
        best(counters + padded(sizeof(Counters))),
        bytes(best + (race ? padded(puzzles * int64_t{sizeof(uint64_t)}) : 0)) {}
};

// More CTAs than parts of the work would only wait.
int64_t most_ctas_of_latency(const Shape& s) { return std::max({s.hidden / 16, s.features / 16 * 4, int64_t{kTiles}}); }

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Of a problem with all its memory.
void run(Problem p, const Plan& plan, cudaStream_t stream) {
  p.layout = layout_of(p.shape);
  p.slot_bytes = plan.slot_bytes;
  check(cudaMemsetAsync(p.counters, 0, sizeof(Counters), stream), "cudaMemsetAsync of the counters");
  check_tokens(p, stream);
  load_selection();

  const Kernel kernel = kernel_of(plan.kernel, p.shape.features);
  check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared_bytes)),
        "cudaFuncSetAttribute of the shared memory");
  cudaLaunchAttribute attribute{};
  if (plan.kernel == Plan::Kernel::latency) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(plan.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(plan.ctas));
  config.blockDim = dim3(unsigned(plan.threads));
  config.dynamicSmemBytes = size_t(plan.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = plan.kernel == Plan::Kernel::throughput_mma ? 0 : 1;  // which knows no clusters, as sm_80 does not
  void* arguments[] = {&p};
  check(cudaLaunchKernelExC(&config, kernel.function, arguments), kernel_name(plan.kernel));
}

}  // namespace

const char* kernel_name(Plan::Kernel kernel) {
  switch (kernel) {
    case Plan::Kernel::throughput_mma: return "throughput_mma";
    case Plan::Kernel::throughput_wgmma: return "throughput_wgmma";
    default: return "latency";
  }
}

Kernel kernel_of(Plan::Kernel kernel, int64_t features) {
  switch (kernel) {
    case Plan::Kernel::throughput_mma: return throughput_mma_kernel(features);
    case Plan::Kernel::throughput_wgmma: return throughput_wgmma_kernel(features);
    default: return latency_kernel(features);
  }
}

std::string why_not(const Shape& s, Precision precision) {
  constexpr const char* kRemedy = "; use backend='triton' or backend='reference'";
  if (precision != Precision::bf16)
    return text("the kernels compute in bf16, not in ", precision_name(precision),
                "; use precision='bf16', or backend='triton' or backend='reference'");
  if (s.heads || !s.mixer_hidden)
    return text("the kernels have the token SwiGLU (mlp_t=True) and no attention", kRemedy);
  if (s.features != 128 && s.features != 256 && s.features != 512)
    return text("the kernels take hidden_size 128, 256 and 512, got ", s.features, kRemedy);
  if (s.tokens > kTokens) return text("the kernels take seq_len up to ", kTokens, ", got ", s.tokens, kRemedy);
  return "";
}

DeviceLimits device_limits(int device) {
  return {attribute(cudaDevAttrComputeCapabilityMajor, device), attribute(cudaDevAttrComputeCapabilityMinor, device),
          attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
}

Plan plan(const Shape& s, const DeviceLimits& device, Regime regime, int64_t trajectories, int64_t slots,
          int64_t window, int64_t depth, int64_t puzzles, bool race) {
  if (const std::string why = why_not(s, Precision::bf16); !why.empty()) throw std::invalid_argument(why);
  if (device.major < 8 || device.major > 9)
    throw std::invalid_argument(text("the kernels are compiled for compute capability 8.x and 9.0, and the device has ",
                                     device.major, ".", device.minor, "; use ",
                                     device.major < 8 ? "" : "backend='triton' or ", "backend='reference'"));
  trajectories = std::max<int64_t>(trajectories, 1);
  const bool latency = regime == Regime::latency || (regime == Regime::automatic && trajectories <= kMostForLatency);
  Plan out{};
  out.kernel = latency             ? Plan::Kernel::latency
               : device.major == 9 ? Plan::Kernel::throughput_wgmma
                                   : Plan::Kernel::throughput_mma;
  const Kernel kernel = kernel_of(out.kernel, s.features);
  if (kernel.shared_bytes > device.shared_bytes)
    throw std::invalid_argument(text("kernel ", kernel_name(out.kernel), " needs ", kernel.shared_bytes,
                                     " bytes of shared memory for hidden_size ", s.features, ", and the device has ",
                                     device.shared_bytes, " for a CTA; use backend='triton' or backend='reference'"));
  out.threads = kernel.threads;
  out.shared_bytes = kernel.shared_bytes;
  out.cluster = 1;
  if (latency) {
    out.ctas = int(std::min<int64_t>(device.multiprocessors, most_ctas_of_latency(s)));
    out.slots = 1;
  } else {
    const int64_t ctas = std::max<int64_t>(1, std::min({slots, trajectories, int64_t{device.multiprocessors}}));
    if (out.kernel == Plan::Kernel::throughput_wgmma && ctas >= 2) out.cluster = 2;
    // An odd trajectory has a cluster with a CTA that takes none, lest it waits for another's end.
    const bool odd = ctas % out.cluster && ctas == trajectories && ctas < device.multiprocessors;
    out.ctas = int((ctas + (odd ? 1 : 0)) / out.cluster * out.cluster);
    out.slots = out.ctas;
  }
  out.slot_bytes = padded(kernel.slot_bytes(s, std::min(window, depth)));
  out.work_bytes = kernel.work_bytes ? kernel.work_bytes(s) : 0;
  out.workspace_bytes = Workspace(out.slots, out, puzzles, race).bytes;
  return out;
}

int64_t packed_bytes(const Shape& s) { return layout_of(s).bytes; }

void launch(Problem p, const Plan& plan, void* workspace, cudaStream_t stream) {
  char* const base = static_cast<char*>(workspace);
  const Workspace at(plan.slots, plan, p.puzzles, is_race(p));
  p.slots = base;
  p.work = base + at.work;
  p.counters = reinterpret_cast<Counters*>(base + at.counters);
  p.best = is_race(p) ? reinterpret_cast<uint64_t*>(base + at.best) : nullptr;
  if (is_race(p))
    check(cudaMemsetAsync(p.best, 0xFF, p.puzzles * sizeof(uint64_t), stream), "cudaMemsetAsync of the best");
  p.count = p.puzzles * p.breadth;
  p.parked = nullptr;
  run(p, plan, stream);
}

int64_t parked_bytes() { return sizeof(Control); }
int64_t quantum_workspace_bytes(const Plan& plan) { return Workspace(0, plan, 0, false).bytes; }

void launch_quantum(Problem p, const Plan& plan, void* workspace, cudaStream_t stream) {
  char* const base = static_cast<char*>(workspace);
  const Workspace at(0, plan, 0, false);
  p.work = base + at.work;
  p.counters = reinterpret_cast<Counters*>(base + at.counters);
  run(p, plan, stream);
}

void use_device(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }

int64_t* device_view(int64_t* host) {
  cudaPointerAttributes about{};
  check(cudaPointerGetAttributes(&about, host), "cudaPointerGetAttributes");
  return about.type == cudaMemoryTypeHost || about.type == cudaMemoryTypeManaged
             ? static_cast<int64_t*>(about.devicePointer)
             : nullptr;
}

}  // namespace eqr::cuda
