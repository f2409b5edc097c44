// How a run asks its caller, now and then, whether to go on.
#pragma once

#include <chrono>
#include <utility>

namespace eqr::cpu {

// The caller's `poll`, which costs more than a look at the clock; null where there is nobody to ask.
class Poll {
 public:
  static constexpr std::chrono::milliseconds kInterval{20};

  explicit Poll(bool (*function)()) : function_(function) {}

  bool asks() const { return function_ != nullptr; }

  // False once: after that it asks no more.
  bool operator()() {
    if (!function_ || Clock::now() < next_) return true;
    const auto function = std::exchange(function_, nullptr);
    if (!function()) return false;
    function_ = function;
    next_ = Clock::now() + kInterval;
    return true;
  }

 private:
  using Clock = std::chrono::steady_clock;

  bool (*function_)();
  Clock::time_point next_ = Clock::now() + kInterval;
};

}  // namespace eqr::cpu
