// What the torch side needs of the CUDA runtime besides launch.h, for it sees no CUDA headers.
#pragma once

#include <stdint.h>

namespace eqr::cuda {

// Makes a device the current one of this library's own copy of the runtime.
void use_device(int device);

// How the current device sees the memory that the host sees at `host`: page-locked, or managed. Null for other memory.
int64_t* device_view(int64_t* host);

}  // namespace eqr::cuda
