// The unit of work of the CPU kernels.
#pragma once

namespace eqr::cpu {

constexpr int kBlock = 1024;  // elements of a work item

}  // namespace eqr::cpu
