// The Python side of an open run: eqr_kernels._C.OpenRun.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "torch/module.h"
#include "torch/served_run.h"

namespace py = pybind11;

namespace eqr {
namespace {

const char* name_of(cpu::Outcome outcome) {
  switch (outcome) {
    case cpu::Outcome::cancelled: return "cancelled";
    case cpu::Outcome::failed: return "failed";
    default: return "complete";
  }
}

class OpenRun {
 public:
  OpenRun(int threads, int64_t quantum, int64_t in_flight, const std::string& policy) {
    if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
    if (quantum < 1) throw std::invalid_argument("quantum must be at least 1, got " + std::to_string(quantum));
    if (in_flight < 1) throw std::invalid_argument("in_flight must be at least 1, got " + std::to_string(in_flight));
    const bool fifo = policy == "fifo";
    if (!fifo && policy != "least_service")
      throw std::invalid_argument("policy must be one of least_service, fifo, got '" + policy + "'");
    run_ =
        ServedRun::make(threads, quantum, in_flight, fifo ? cpu::Policy::fifo : cpu::Policy::least_service, &handle_);
  }
  // Its threads may be in the middle of an outer step. A forked child has none of them, and leaves all as it is:
  // whoever waited there for a condition will for ever.
  ~OpenRun() {
    if (getpid() != process_) {
      new std::shared_ptr(std::move(run_));
      return;
    }
    const py::gil_scoped_release release;
    run_.reset();
  }

  int64_t handle() const { return handle_; }
  void cancel(int64_t number) { run_->cancel(number); }
  void close() { run_->close(); }

  py::list take() {
    std::vector<RunEvent> events;
    {
      const py::gil_scoped_release release;
      events = run_->take();
    }
    py::list out;
    for (const RunEvent& e : events) {
      const EndedTrajectory& t = e.trajectory;
      switch (e.kind) {
        case RunEvent::Kind::begun: out.append(py::make_tuple(e.number)); break;
        case RunEvent::Kind::done: out.append(py::make_tuple(e.number, name_of(e.outcome), e.error)); break;
        case RunEvent::Kind::step:
          out.append(py::make_tuple(e.number, t.puzzle, t.restart, t.status, t.steps, t.residual, t.q_halt, t.preds));
      }
    }
    return out;
  }

  py::tuple counts() const {
    const cpu::OpenRun::Counts counts = run_->counts();
    return py::make_tuple(counts.in_flight, counts.steps, counts.busy_seconds);
  }

 private:
  const pid_t process_ = getpid();
  int64_t handle_ = 0;
  std::shared_ptr<ServedRun> run_;
};

}  // namespace

void add_open_run(py::module_& m) {
  py::class_<OpenRun>(m, "OpenRun", "Problems join it, by torch.ops.eqr_kernels.open_run_join, while it goes on.")
      .def(py::init<int, int64_t, int64_t, const std::string&>(), py::kw_only(), py::arg("threads"), py::arg("quantum"),
           py::arg("in_flight"), py::arg("policy"))
      .def_property_readonly("handle", &OpenRun::handle)
      .def("cancel", &OpenRun::cancel, py::arg("number"), "What is left of the problem ends at the next outer step.")
      .def("close", &OpenRun::close, "Nobody joins any more; what is there comes to its end.")
      .def("take", &OpenRun::take,
           "Waits for events: (number,) of a problem all of which has begun, (number, puzzle, restart, status, steps, "
           "residual, q_halt, preds) of an outer step, "
           "(number, outcome, error) of a problem that has ended. None once it is closed and all have ended.")
      .def("counts", &OpenRun::counts, "Trajectories in flight; outer steps, and seconds that threads spent in them.");
}

}  // namespace eqr
