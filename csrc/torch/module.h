// The parts of the Python module eqr_kernels._C. (pybind11's headers and torch's do not go together in one file.)
#pragma once

#include <pybind11/pybind11.h>

namespace eqr {

void add_polling(pybind11::module_&);
void add_open_run(pybind11::module_&);

}  // namespace eqr
