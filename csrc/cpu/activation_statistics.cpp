// Binds the statistics of activations.
#include "cpu/activation_statistics.h"

#include <pybind11/pybind11.h>

#include <tuple>

namespace py = pybind11;

void register_activation_statistics(py::module_& module) {
  using Pointer = std::uintptr_t;
  module.def("activation_statistics", [](Pointer data, int64_t channels, int64_t channel_stride,
                                         Pointer places, int64_t positions, int64_t thin, int threads) {
    const py::gil_scoped_release release;
    const rlnas::LookedAt x{reinterpret_cast<const float*>(data),
                            channels,
                            channel_stride,
                            reinterpret_cast<const int64_t*>(places),
                            positions,
                            thin,
                            threads};
    const rlnas::ActivationStatistics s = RLNAS_DISPATCH(activation_statistics, x);
    return std::make_tuple(s.mean, s.variance, s.entropy, s.sparsity, s.correlation);
  });
}
