// The unit of work of the element-wise CPU kernels.
#pragma once

#include <stdint.h>

namespace eqr::cpu {

constexpr int kBlock = 1024;   // elements of a work item
constexpr int64_t kGrain = 8;  // work items below which a second thread costs more than it saves

constexpr int64_t block_count(int64_t elements) { return (elements + kBlock - 1) / kBlock; }

}  // namespace eqr::cpu
