// The throughput regime by wgmma, in clusters, for sm_90a alone.
#include "cuda/channel_mixer_wgmma.h"
#include "cuda/kernels.h"

namespace eqr::cuda {

template <int D>
__global__ void __launch_bounds__(ThroughputWgmma<Device, D>::kThreads, 1)
    throughput_wgmma(const __grid_constant__ Problem p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  ThroughputWgmma<Device, D>{p}.run();
#else
  __trap();  // never launched there; nothing must take it for a run that has ended
#endif
}

template __global__ void throughput_wgmma<128>(const __grid_constant__ Problem p);
template __global__ void throughput_wgmma<256>(const __grid_constant__ Problem p);
template __global__ void throughput_wgmma<512>(const __grid_constant__ Problem p);

namespace {

template <int D>
struct Of {
  static Kernel kernel() {
    using Machine = WgmmaMachine<Device, D>;
    return {reinterpret_cast<const void*>(&throughput_wgmma<D>),
            ThroughputWgmma<Device, D>::kThreads,
            sizeof(typename Machine::Shared),
            Machine::Tiles::kOrder,
            &Slot<D>::bytes,
            nullptr};
  }
};

}  // namespace

Kernel throughput_wgmma_kernel(int64_t features) { return of_features<Of>(features); }

}  // namespace eqr::cuda
