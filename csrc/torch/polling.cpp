// The Python side of polling.h: what an op asks now and then, and the signals that it handles then.
#include "torch/polling.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <chrono>
#include <optional>
#include <thread>
#include <utility>

#include "torch/ended.h"
#include "torch/module.h"

namespace py = pybind11;

namespace eqr {
namespace {

// One call of with_poll; the innermost of this thread is `polled`.
struct Polled {
  py::object ask, ended;
  EndedQueue queue;
  std::optional<py::error_already_set> error;  // what a signal handler or `ask` raised
};

thread_local Polled* polled = nullptr;

// Who takes the GIL while the interpreter shuts down is ended on the spot, in the middle of the op: a daemon thread
// must not poll any more by then.
std::atomic<bool> closing{false};
std::atomic<int> polling{0};

// Runs as the interpreter begins to shut down, and holds that up until nobody wants the GIL.
void stop_polling() {
  closing = true;
  const py::gil_scoped_release release;
  for (int ms = 0; polling && ms < 5000; ++ms) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

// Hands over the trajectories that have ended since the last time.
void hand_over(Polled& p) {
  if (p.ended.is_none()) return;
  for (const EndedTrajectory& t : p.queue.take())
    p.ended(t.puzzle, t.restart, t.status, t.steps, t.residual, t.score, t.q_halt, py::cast(t.preds));
}

// Runs in the middle of an op, which has released the GIL.
bool poll_python() {
  Polled& p = *polled;
  if (p.error) return false;
  struct Count {
    Count() { ++polling; }
    ~Count() { --polling; }
  } count;
  if (closing) return true;
  const py::gil_scoped_acquire gil;
  try {
    if (PyErr_CheckSignals()) throw py::error_already_set();
    hand_over(p);
    return p.ask.is_none() || !p.ask().is(py::bool_(false));
  } catch (py::error_already_set& error) {
    p.error.emplace(error);
    return false;
  }
}

py::object with_poll(const py::function& run, py::object ask, py::object ended) {
  Polled call;
  call.ask = std::move(ask);
  call.ended = std::move(ended);
  struct Restore {
    Polled* outer = polled;
    bool (*outer_poll)() = poll;
    EndedQueue* outer_queue = ended_queue;
    ~Restore() {
      polled = outer;
      poll = outer_poll;
      ended_queue = outer_queue;
    }
  } restore;
  polled = &call;
  poll = &poll_python;
  ended_queue = call.ended.is_none() ? nullptr : &call.queue;
  py::object result;
  try {
    result = run();
  } catch (py::error_already_set& error) {
    if (!call.error) throw;
    PyException_SetContext(call.error->value().ptr(), error.value().inc_ref().ptr());
  }
  if (call.error) throw *call.error;
  hand_over(call);
  return result;
}

}  // namespace

void add_polling(py::module_& m) {
  m.def("with_poll", &with_poll, py::arg("run"), py::arg("ask"), py::arg("ended") = py::none(),
        "run(), whose ops handle signals now and then, call ask() (unless None), and cancel what is left where that "
        "returns False or raises; what it or a signal handler raises is raised again when run() has returned. "
        "ended(puzzle, restart, status, steps, residual, score, q_halt, preds) is called for each trajectory of "
        "fixed_point soon after its end, and raising does as with ask.");
  py::module_::import("atexit").attr("register")(py::cpp_function(&stop_polling));
}

}  // namespace eqr
