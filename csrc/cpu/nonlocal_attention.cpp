// Binds non-local attention; the caller has checked shapes.
#include "cpu/nonlocal_attention.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

namespace py = pybind11;
using namespace rlnas;

namespace {

using Pointer = std::uintptr_t;
View line(Pointer data, int dtype, const std::array<int64_t, 3>& s) {  // [batch, channel, position]
  return {reinterpret_cast<void*>(data), static_cast<DType>(dtype), s[0], s[1], {0, 0, s[2]}};
}

}  // namespace

void register_nonlocal_attention(py::module_& module) {
  module.def(
      "nonlocal_attention_forward", [](std::array<int64_t, 5> sizes, bool deterministic, int threads,
                                       int dtype, const std::array<Pointer, 4>& data,
                                       const std::array<std::array<int64_t, 3>, 4>& strides, Pointer lse) {
        const py::gil_scoped_release release;
        const AttentionShape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], deterministic, threads};
        const auto at = [&](int i) { return line(data[i], dtype, strides[i]); };
        RLNAS_DISPATCH(attention_forward, shape, at(0), at(1), at(2), at(3), reinterpret_cast<float*>(lse));
      });
  module.def(
      "nonlocal_attention_backward", [](std::array<int64_t, 5> sizes, bool deterministic, int threads,
                                        int dtype, const std::array<Pointer, 8>& data,
                                        const std::array<std::array<int64_t, 3>, 8>& strides, Pointer lse) {
        const py::gil_scoped_release release;
        const AttentionShape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], deterministic, threads};
        const auto at = [&](int i) { return line(data[i], dtype, strides[i]); };
        RLNAS_DISPATCH(attention_backward, shape, at(0), at(1), at(2), at(3),
                       reinterpret_cast<const float*>(lse), at(4), at(5), at(6), at(7));
      });
}
