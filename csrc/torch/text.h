// The str arguments of ops, which an op takes as handles: what torch makes of a std::string argument it never lets go
// (https://github.com/pytorch/pytorch/issues/191340, to 2.13 at least).
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>
#include <string>

namespace eqr {

// The text of a handle, which ends here.
inline std::string text_of(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  std::string text;
  const bool read = !torch_string_length(handle, &length) && !torch_string_c_str(handle, &data);
  if (read) text.assign(data, length);
  if (torch_delete_string(handle) || !read) throw std::runtime_error("a str argument of an op cannot be read");
  return text;
}

}  // namespace eqr
