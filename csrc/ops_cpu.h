// What the ops on CPU share.
#pragma once

#include <cfenv>
#include <cstdint>

#include "ops_checks.h"

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

// tokens: [n, S]
inline void check_tokens(const char* name, const int64_t* tokens, int64_t n, int64_t S, int64_t V) {
  for (int64_t i = 0; i < n * S; ++i)
    if (tokens[i] < 0 || tokens[i] >= V) fail(name, " must be in 0..", V - 1, ", got ", tokens[i], " in row ", i / S);
}

}  // namespace eqr
