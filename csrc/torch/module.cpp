// eqr_kernels._C: what the build is and what the machine runs. The ops are in the other files, of the same library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <chrono>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/operator.h"
#include "cpu/peak.h"
#include "cpu/training_step.h"
#ifdef EQR_HAVE_CUDA
#include "torch/cuda_args.h"
#endif
#include "common/philox.h"
#include "torch/module.h"
#include "torch/operator_args.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = EQR_VERSION;
  info["compiler"] = EQR_COMPILER;
  info["build_type"] = EQR_BUILD_TYPE;
  info["torch_headers"] = EQR_TORCH_HEADERS;
  info["torch_target"] = "2.11";
#ifdef EQR_EMULATE_AVX512
  info["avx512"] = "emulated";
#else
  info["avx512"] = "native";
#endif
#ifdef EQR_HAVE_CUDA
  info["cuda"] = EQR_HAVE_CUDA;
  info["cuda_architectures"] = EQR_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  return info;
}

std::array<uint32_t, 4> philox4x32_10(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  const eqr::Words4 w = eqr::philox4x32_10({counter[0], counter[1], counter[2], counter[3]}, {key[0], key[1]});
  return {w.w0, w.w1, w.w2, w.w3};
}

int64_t packed_bytes(const std::vector<int64_t>& sizes, const std::vector<double>& constants, bool fixed_start,
                     const std::string& precision, [[maybe_unused]] const std::string& layout) {
  const eqr::Shape shape = eqr::shape_of(sizes, constants, fixed_start);
#ifdef EQR_HAVE_CUDA
  if (!layout.empty()) return eqr::cuda::packed_length(shape, eqr::cuda::kernel_of_layout(layout));
#endif
  return eqr::cpu::packed_bytes(shape, eqr::precision_of(precision), eqr::cpu::isa());
}

#ifdef EQR_HAVE_CUDA
std::string cuda_why_not(const std::vector<int64_t>& sizes, const std::vector<double>& constants, bool fixed_start,
                         const std::string& precision) {
  return eqr::cuda::why_not(eqr::shape_of(sizes, constants, fixed_start), eqr::precision_of(precision));
}

py::dict cuda_device(int index) {
  const eqr::cuda::DeviceLimits limits = eqr::cuda::device_limits(index);
  py::dict out;
  out["major"] = limits.major;
  out["minor"] = limits.minor;
  out["multiprocessors"] = limits.multiprocessors;
  out["shared_bytes"] = limits.shared_bytes;
  return out;
}

py::dict cuda_plan(const std::vector<int64_t>& sizes, const std::vector<double>& constants, bool fixed_start, int major,
                   int minor, int multiprocessors, int64_t shared_bytes, const std::string& regime,
                   int64_t trajectories, int64_t slots, int64_t window, int64_t depth, int64_t puzzles, bool race) {
  const eqr::cuda::Plan plan =
      eqr::cuda::plan(eqr::shape_of(sizes, constants, fixed_start), {major, minor, multiprocessors, shared_bytes},
                      eqr::cuda::regime_of(regime), trajectories, slots, window, depth, puzzles, race);
  py::dict out;
  out["kernel"] = eqr::cuda::kernel_name(plan.kernel);
  out["ctas"] = plan.ctas;
  out["threads"] = plan.threads;
  out["cluster"] = plan.cluster;
  out["shared_bytes"] = plan.shared_bytes;
  out["slots"] = plan.slots;
  out["slot_bytes"] = plan.slot_bytes;
  out["workspace_bytes"] = plan.workspace_bytes;
  out["parked_bytes"] = eqr::cuda::parked_bytes();
  return out;
}
#endif

int64_t training_scratch_bytes(const std::vector<int64_t>& sizes, const std::vector<double>& constants) {
  return eqr::cpu::training_scratch(eqr::shape_of(sizes, constants, false), eqr::cpu::isa()).bytes();
}

// Operations a second of the registers alone, of each of the slices of a few milliseconds that fit into `seconds`, on
// the calling thread; empty where there is no meter (see cpu/peak.h).
std::vector<double> peak(const std::string& precision, double seconds) {
  using Clock = std::chrono::steady_clock;
  const eqr::Precision p = eqr::precision_of(precision);
  const py::gil_scoped_release release;
  const auto timed = [p](int64_t rounds, double* taken) {
    const Clock::time_point start = Clock::now();
    const int64_t operations = EQR_DISPATCH(peak_burst, p, rounds);
    *taken = std::chrono::duration<double>(Clock::now() - start).count();
    return operations;
  };
  std::vector<double> rates;
  int64_t rounds = 1000;
  for (double taken = 0; taken < 1e-3; rounds *= 2)
    if (!timed(rounds, &taken)) return rates;
  const auto length = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  const Clock::time_point end = Clock::now() + length;
  do {
    double taken;
    const int64_t operations = timed(rounds, &taken);
    rates.push_back(double(operations) / taken);
  } while (Clock::now() < end);
  return rates;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of eqr_kernels; import torch first. Use eqr_kernels.ops.";
  m.def("build_info", &build_info, "What this library was built with.");
  m.def("cpu_isas", &eqr::cpu::available_isas, "Instruction sets that this build and this machine have, best last.");
  m.def("cpu_isa", [] { return eqr::cpu::isa_name(eqr::cpu::isa()); }, "The instruction set in use.");
  m.def("set_cpu_isa", &eqr::cpu::set_isa, py::arg("name"), "Chooses the instruction set for this process.");
  m.def("packed_bytes", &packed_bytes, py::arg("sizes"), py::arg("constants"), py::arg("fixed_start"),
        py::arg("precision"), py::arg("layout") = "",
        "Size of what pack_weights gives for the instruction set in use; on a CUDA device, for a layout.");
#ifdef EQR_HAVE_CUDA
  m.def("cuda_why_not", &cuda_why_not, py::arg("sizes"), py::arg("constants"), py::arg("fixed_start"),
        py::arg("precision"), "Why the CUDA kernels do not take an operator on any device, or empty.");
  m.def("cuda_device", &cuda_device, py::arg("index"), "What a plan must know of a device, as arguments of cuda_plan.");
  m.def("cuda_plan", &cuda_plan, py::arg("sizes"), py::arg("constants"), py::arg("fixed_start"), py::kw_only(),
        py::arg("major"), py::arg("minor"), py::arg("multiprocessors"), py::arg("shared_bytes"), py::arg("regime"),
        py::arg("trajectories"), py::arg("slots"), py::arg("window"), py::arg("depth"), py::arg("puzzles"),
        py::arg("race"), "How a run would be launched on a device; needs none.");
#endif
  eqr::add_polling(m);
  eqr::add_open_run(m);
  m.def("philox4x32_10", &philox4x32_10, py::arg("counter"), py::arg("key"), "Four words of csrc/common/philox.h.");
  m.def("training_scratch_bytes", &training_scratch_bytes, py::arg("sizes"), py::arg("constants"));
  m.def("peak", &peak, py::arg("precision"), py::arg("seconds"),
        "Operations a second of multiply-adds in registers alone on this thread, one rate for each few milliseconds; "
        "empty where the instructions in use have no meter.");
}
