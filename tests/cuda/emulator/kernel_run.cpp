#include "kernel_run.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cuda/channel_mixer_mma.h"
#include "cuda/channel_mixer_wgmma.h"
#include "cuda/latency.h"
#include "cuda/pack.h"

namespace eqr::test {
namespace {

using emu::Emulated;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

// NaN in every format, so that nothing counts on zeros.
Buffer poisoned(int64_t bytes) {
  char* p = static_cast<char*>(std::aligned_alloc(128, size_t(bytes + 127) / 128 * 128));
  return Buffer(static_cast<char*>(std::memset(p, 0xFF, size_t(bytes))));
}

void pack_all(const Shape& shape, const cuda::Order& order, const OperatorWeights& weights, char* packed) {
  cuda::Pack pack = {shape, order, cuda::layout_of(shape), weights, {}, packed};
  for (int64_t layer = 0; layer < shape.layers; ++layer) {
    pack.block = weights.blocks[layer];
    cuda::pack_layer<Emulated>(pack, layer, 0, 1);
  }
  cuda::pack_rest<Emulated>(pack, 0, 1);
}

template <class Body>
void launch(const KernelRun& how, int ctas, int threads, int cluster, int64_t shared_bytes, const Body& body) {
  emu::Launch shape;
  shape.ctas = ctas, shape.threads = threads, shape.cluster = cluster;
  shape.shared_bytes = int(shared_bytes), shape.seed = how.seed;
  emu::launch(shape, body);
}

template <int D>
void run(const KernelRun& how, const OperatorWeights& weights, cuda::Problem p) {
  using Mma = cuda::MmaMachine<Emulated, D>;
  using Wgmma = cuda::WgmmaMachine<Emulated, D>;
  using Latency = cuda::Latency<Emulated, D>;
  const bool mma = how.kernel == "throughput_mma", wgmma = how.kernel == "throughput_wgmma";
  const int64_t T = p.puzzles * p.breadth, ring = p.window < p.depth ? p.window : p.depth;
  p.layout = cuda::layout_of(p.shape);
  const Buffer packed = poisoned(p.layout.bytes);
  pack_all(p.shape, mma ? Mma::Tiles::kOrder : wgmma ? Wgmma::Tiles::kOrder : Latency::kOrder, weights, packed.get());
  p.packed = packed.get();
  p.slot_bytes =
      mma || wgmma ? cuda::Slot<D>::bytes(p.shape, ring) : cuda::LatencyScratch<D>::slot_bytes(p.shape, ring);
  const Buffer slots = poisoned((how.quantum ? T : how.slots) * p.slot_bytes);
  const Buffer work = poisoned(cuda::LatencyScratch<D>::work_bytes(p.shape));
  p.slots = slots.get(), p.work = work.get();
  std::vector<uint64_t> best(size_t(p.puzzles), ~uint64_t{0});
  p.best = is_race(p) ? best.data() : nullptr;
  const auto launch_once = [&] {
    cuda::Counters counters = {};
    p.counters = &counters;
    const cuda::Problem& problem = p;
    if (mma)
      launch(how, int(how.slots), cuda::Sizes<D>::kThreads, 1, sizeof(typename Mma::Shared),
             [&] { cuda::throughput_mma_body<Emulated, D>(problem); });
    else if (wgmma)
      launch(how, int(how.slots), cuda::ThroughputWgmma<Emulated, D>::kThreads, how.cluster,
             sizeof(typename Wgmma::Shared), [&] { cuda::ThroughputWgmma<Emulated, D>{problem}.run(); });
    else
      launch(how, how.ctas, Latency::kThreads, 1, sizeof(typename Latency::Shared), [&] { Latency{problem}.run(); });
  };
  p.count = T;
  if (!how.quantum) return launch_once();
  std::vector<cuda::Control> parked(size_t(T), cuda::Control{});
  p.parked = parked.data(), p.quantum = how.quantum;
  std::vector<int64_t> going;
  for (int64_t t = 0; t < T; ++t) going.push_back(t), p.end.status[t] = kGoing;
  int64_t finished = 0, spent = 0;
  for (size_t launches = 0; !going.empty(); ++launches) {
    std::rotate(going.begin(), going.begin() + int64_t(launches % going.size()), going.end());
    p.count = launches % 2 ? int64_t(going.size()) : int64_t(going.size() + 1) / 2;
    p.rows = going.data();
    if (p.control) p.control[1] = p.control[2] = 0;
    launch_once();
    if (p.control) finished += p.control[1], spent += p.control[2];
    std::erase_if(going, [&](int64_t t) { return p.end.status[t] != kGoing; });
  }
  if (p.control) p.control[1] = finished, p.control[2] = spent;
}

}  // namespace

std::vector<std::string> kernels() { return {"throughput_mma", "throughput_wgmma", "latency"}; }

void run_kernel(const KernelRun& how, const OperatorWeights& weights, cuda::Problem problem) {
  bool known = false;
  for (const std::string& kernel : kernels()) known |= kernel == how.kernel;
  if (!known) throw std::invalid_argument("no kernel is called '" + how.kernel + "'");
  switch (problem.shape.features) {
    case 128: return run<128>(how, weights, problem);
    case 256: return run<256>(how, weights, problem);
    case 512: return run<512>(how, weights, problem);
    default:
      throw std::invalid_argument("the kernels have 128, 256 or 512 features, got " +
                                  std::to_string(problem.shape.features));
  }
}

}  // namespace eqr::test
