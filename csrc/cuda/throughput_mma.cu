// The throughput regime by mma.sync, for every architecture from sm_80 on.
#include "cuda/channel_mixer_mma.h"
#include "cuda/kernels.h"

namespace eqr::cuda {

template <int D>
__global__ void __launch_bounds__(Sizes<D>::kThreads, 1) throughput_mma(const __grid_constant__ Problem p) {
  throughput_mma_body<Device, D>(p);
}

template __global__ void throughput_mma<128>(const __grid_constant__ Problem p);
template __global__ void throughput_mma<256>(const __grid_constant__ Problem p);
template __global__ void throughput_mma<512>(const __grid_constant__ Problem p);

namespace {

template <int D>
struct Of {
  static Kernel kernel() {
    using Machine = MmaMachine<Device, D>;
    return {reinterpret_cast<const void*>(&throughput_mma<D>),
            Sizes<D>::kThreads,
            sizeof(typename Machine::Shared),
            Machine::Tiles::kOrder,
            &Slot<D>::bytes,
            nullptr};
  }
};

}  // namespace

Kernel throughput_mma_kernel(int64_t features) { return of_features<Of>(features); }

}  // namespace eqr::cuda
