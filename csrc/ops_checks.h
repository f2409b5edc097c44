// Messages and checks that the files of ops share.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace eqr {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

template <class Sizes>
std::string list(const Sizes& sizes) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  return out.str() + "]";
}

inline std::string shape(const torch::stable::Tensor& t) { return list(t.sizes()); }

inline const char* dtype_name(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Long: return "int64";
    case ScalarType::Byte: return "uint8";
    default: return torch::headeronly::toString(dtype);
  }
}

// Where a tensor is, as far as the ops tell places apart.
struct Place {
  bool cuda = false;
  int index = 0;

  bool operator==(const Place&) const = default;
  std::string name() const { return cuda ? "cuda:" + std::to_string(index) : "CPU"; }
};

inline Place place_of(const torch::stable::Tensor& t) {
  return t.is_cuda() ? Place{true, int(t.get_device_index())} : Place{};
}

// `t` must be a contiguous tensor of `dtype` and `sizes` on `place`.
inline void check_tensor(const std::string& name, const torch::stable::Tensor& t, torch::headeronly::ScalarType dtype,
                         const std::vector<int64_t>& sizes, const Place& place = {}) {
  const bool there = (t.is_cpu() || t.is_cuda()) && place_of(t) == place;
  bool good = there && t.scalar_type() == dtype && t.dim() == int64_t(sizes.size()) && t.is_contiguous();
  for (size_t i = 0; good && i < sizes.size(); ++i) good = t.size(int64_t(i)) == sizes[i];
  if (!good)
    fail(name, " must be a contiguous ", dtype_name(dtype), " tensor ", list(sizes), " on ", place.name(), ", got ",
         t.is_contiguous() ? "" : "a non-contiguous ", dtype_name(t.scalar_type()), " tensor ", shape(t),
         there ? "" : " on another device", "; use .to(device), .to(dtype) or .contiguous()");
}

inline void check_noise_scale(double noise_scale) {
  if (!std::isfinite(noise_scale) || noise_scale < 0)
    fail("noise_scale must be finite and at least 0, got ", noise_scale);
}

}  // namespace eqr
