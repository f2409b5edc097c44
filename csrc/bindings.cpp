// eqr_kernels._C: what the build is and what the machine runs. The ops are in ops.cpp, in the same library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/isa.h"
#include "philox.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = EQR_VERSION;
  info["compiler"] = EQR_COMPILER;
  info["build_type"] = EQR_BUILD_TYPE;
  info["torch_headers"] = EQR_TORCH_HEADERS;
  info["torch_target"] = "2.11";
#ifdef EQR_HAVE_CUDA
  info["cuda"] = EQR_HAVE_CUDA;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

std::array<uint32_t, 4> philox4x32_10(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  const eqr::Words4 w = eqr::philox4x32_10({counter[0], counter[1], counter[2], counter[3]}, {key[0], key[1]});
  return {w.w0, w.w1, w.w2, w.w3};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of eqr_kernels; import torch first. Use eqr_kernels.ops.";
  m.def("build_info", &build_info, "What this library was built with.");
  m.def("cpu_isas", &eqr::cpu::available_isas, "Instruction sets that this build and this machine have, best last.");
  m.def("cpu_isa", [] { return eqr::cpu::isa_name(eqr::cpu::isa()); }, "The instruction set in use.");
  m.def("set_cpu_isa", &eqr::cpu::set_isa, py::arg("name"), "Chooses the instruction set for this process.");
  m.def("philox4x32_10", &philox4x32_10, py::arg("counter"), py::arg("key"), "Four words of csrc/philox.h.");
}
