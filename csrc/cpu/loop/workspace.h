// Memory for a trajectory in flight.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

namespace eqr::cpu {

class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(bytes), data_(::operator new(size_t(bytes), kAlign)) {}
  ~Workspace() { ::operator delete(data_, kAlign); }
  Workspace(Workspace&& other) noexcept : bytes_(other.bytes_), data_(std::exchange(other.data_, nullptr)) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return data_; }
  void clear() { std::memset(data_, 0, size_t(bytes_)); }

 private:
  static constexpr std::align_val_t kAlign{64};

  const int64_t bytes_;
  void* data_;
};

}  // namespace eqr::cpu
