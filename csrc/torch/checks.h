// The messages and checks of the ops. They are what keeps an op from reading out of bounds or running for ever, whoever
// calls it; what is said to the users of `solve` is said in eqr_kernels/solver.py.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
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

template <class Choice>
Choice choice(const char* name, const std::string& value,
              std::initializer_list<std::pair<const char*, Choice>> allowed) {
  std::string names;
  for (const auto& [text, result] : allowed) {
    if (value == text) return result;
    names += (names.empty() ? "" : ", ") + std::string(text);
  }
  fail(name, " must be one of ", names, ", got '", value, "'");
}

inline void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) fail(name, " must be in ", low, "..", high, ", got ", value);
}

// tokens: [n, S]
inline void check_tokens(const char* name, const int64_t* tokens, int64_t n, int64_t S, int64_t V) {
  for (int64_t i = 0; i < n * S; ++i)
    if (tokens[i] < 0 || tokens[i] >= V) fail(name, " must be in 0..", V - 1, ", got ", tokens[i], " in row ", i / S);
}

// rng: int64 [n, 4] with the columns seed, restart, id, step
inline void check_rng(const torch::stable::Tensor& rng, int64_t stream) {
  const bool int64 = rng.scalar_type() == torch::headeronly::ScalarType::Long;
  if (!int64 || rng.dim() != 2 || rng.size(1) != 4 || !rng.is_contiguous())
    fail("rng must be a contiguous int64 tensor [n, 4] (seed, restart, id, step), got shape ", shape(rng),
         int64 ? "" : " of another dtype", "; build it with eqr_kernels.noise.make_rng");
  if (stream < 0 || stream > 255) fail("stream must be in 0..255, got ", stream);
  const int64_t* row = rng.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rng.size(0); ++i, row += 4) {
    if (row[0] < 0 || row[0] >> 32) fail("rng column 0 (seed) must be in 0..2**32 - 1, got ", row[0], " in row ", i);
    if (row[1] < 0 || row[1] >> 32) fail("rng column 1 (restart) must be in 0..2**32 - 1, got ", row[1], " in row ", i);
    if (row[3] < 0 || row[3] >> 24) fail("rng column 3 (step) must be in 0..2**24 - 1, got ", row[3], " in row ", i);
  }
}

inline void check_numel(int64_t numel) {
  // element / 4 is one 32-bit word of the counter
  if (numel < 0 || numel >> 34) fail("numel must be in 0..2**34 - 1, got ", numel);
}

}  // namespace eqr
