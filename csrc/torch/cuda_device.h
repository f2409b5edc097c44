// A CUDA device and torch's current stream on it.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/runtime.h"
#include "torch/checks.h"

namespace eqr {

// torch's current device and stream are those of `place`, for torch's copy of the CUDA runtime and for ours.
class On {
 public:
  explicit On(const Place& place) : guard_(place.index) {
    cuda::use_device(place.index);
    // Of a library that a torch without CUDA lacks, and that Python loads locally: so by name, when it is needed.
    using Current = int32_t (*)(int32_t, void**);
    static const Current current = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
      return library ? reinterpret_cast<Current>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    void* stream = nullptr;
    if (!current || current(place.index, &stream) != 0)
      throw std::runtime_error("torch does not tell its current stream on " + place.name() +
                               "; use a torch with CUDA, or backend='reference'");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline void check_taken(const Shape& s, Precision precision) {
  if (const std::string why = cuda::why_not(s, precision); !why.empty()) fail(why);
}

}  // namespace eqr
