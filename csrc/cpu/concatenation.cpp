// Binds the sweep of concatenation attention.
#include "cpu/concatenation.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

namespace py = pybind11;

void register_concatenation(py::module_& module) {
  module.def("concatenation_sweep", [](std::array<int64_t, 4> sizes, double scale,
                                       const std::array<std::uintptr_t, 6>& data, int threads) {
    const py::gil_scoped_release release;
    const auto at = [&](int i) { return reinterpret_cast<float*>(data[i]); };
    const rlnas::SweepShape shape{sizes[0], sizes[1], sizes[2], sizes[3], scale, threads};
    RLNAS_DISPATCH(concatenation_sweep, shape, at(0), at(1), at(2), at(3), at(4), at(5));
  });
}
