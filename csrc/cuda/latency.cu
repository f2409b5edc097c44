// The latency regime, for every architecture from sm_80 on. A cooperative launch: all CTAs must run at a time.
#include "cuda/latency.h"

#include "cuda/kernels.h"

namespace eqr::cuda {

template <int D>
__global__ void __launch_bounds__(Latency<Device, D>::kThreads, 1) latency(const __grid_constant__ Problem p) {
  Latency<Device, D>{p}.run();
}

template __global__ void latency<128>(const __grid_constant__ Problem p);
template __global__ void latency<256>(const __grid_constant__ Problem p);
template __global__ void latency<512>(const __grid_constant__ Problem p);

namespace {

template <int D>
struct Of {
  static Kernel kernel() {
    using Body = Latency<Device, D>;
    return {reinterpret_cast<const void*>(&latency<D>),
            Body::kThreads,
            sizeof(typename Body::Shared),
            Body::kOrder,
            &LatencyScratch<D>::slot_bytes,
            &LatencyScratch<D>::work_bytes};
  }
};

}  // namespace

Kernel latency_kernel(int64_t features) { return of_features<Of>(features); }

}  // namespace eqr::cuda
