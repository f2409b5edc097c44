// The floating-point environment of the threads that compute.
#pragma once

#include <cfenv>

namespace eqr {

// Rounding and the treatment of denormals are each thread's own (torch.set_flush_denormal): without this, a result
// would depend on the thread that computes it.
class DefaultFloatingPoint {
 public:
  DefaultFloatingPoint() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatingPoint() { std::fesetenv(&before_); }
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
  DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;

 private:
  std::fenv_t before_;
};

}  // namespace eqr
