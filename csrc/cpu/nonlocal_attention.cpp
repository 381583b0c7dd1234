// Binds the non-local kernels; the caller has checked shapes.
#include "cpu/nonlocal_attention.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/concatenation.h"
#include "cpu/tensors.h"

namespace py = pybind11;
using namespace rlnas;

namespace {

enum Kind { kSoftmax, kDotProduct, kConcatenation };  // as in rlnas_fast/ops/nonlocal_attention/cpu.py
using Pointer = std::uintptr_t;
using Strides = std::array<int64_t, 5>;  // batch, channel, depth, height, width

View line(Pointer data, int dtype, const std::array<int64_t, 3>& s) {  // [batch, channel, position]
  return {reinterpret_cast<void*>(data), static_cast<DType>(dtype), s[0], s[1], {0, 0, s[2]}};
}

// Runs the task while other threads may run Python.
template <class F>
void unlocked(F task) {
  const py::gil_scoped_release release;
  task();
}

// A fused block for tensors of one layout.
class BlockKernel {
 public:
  // saved: where the parts of BlockSaved begin in one tensor, in bytes; -1 for what is absent.
  BlockKernel(int kind, const std::array<int64_t, 4>& sizes, const std::array<int64_t, 3>& space,
              const std::array<int64_t, 3>& pool, bool residual, int dtype, const Strides& x_strides,
              const Strides& z_strides, const std::array<int64_t, 5>& saved)
      : kind_(kind),
        shape_{sizes[0],
               sizes[1],
               sizes[2],
               sizes[3],
               {space[0], space[1], space[2]},
               {pool[0], pool[1], pool[2]},
               residual,
               false,
               1},
        dtype_(static_cast<DType>(dtype)),
        x_strides_(x_strides),
        z_strides_(z_strides),
        saved_(saved) {}

  // tensors: x, theta, phi, g, out, their biases, pair; saved None keeps nothing.  Returns z.
  py::object forward(const py::tuple& tensors, py::handle saved) const {
    py::object z = empty_like(tensors[0]);
    const View from = view(address(tensors[0]), x_strides_), to = view(address(z), z_strides_);
    const BlockWeights weights = weights_of(tensors);
    const BlockSaved kept = places(saved);
    const BlockShape shape = shape_now();
    unlocked([&] {
      if (kind_ == kSoftmax) RLNAS_DISPATCH(block_forward, shape, weights, from, to, kept);
      if (kind_ == kDotProduct) RLNAS_DISPATCH(dot_product_forward, shape, weights, from, to, kept);
      if (kind_ == kConcatenation) RLNAS_DISPATCH(concatenation_forward, shape, weights, from, to, kept);
    });
    return z;
  }

  // Returns the gradients of the tensors, in their order.
  py::tuple backward(py::handle grad_z, const py::tuple& tensors, py::handle saved) const {
    py::tuple gradients(tensors.size());
    for (size_t i = 0; i < tensors.size(); i++) gradients[i] = empty_like(tensors[i]);
    const View from = view(address(tensors[0]), x_strides_), to = view(address(gradients[0]), z_strides_);
    const View upstream = view(address(grad_z), strides(grad_z));
    const BlockWeights weights = weights_of(tensors);
    const auto at = [&](size_t i) { return address(gradients[i]); };
    const BlockGradients into{at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9)};
    const BlockSaved kept = places(saved);
    const BlockShape shape = shape_now();
    unlocked([&] {
      if (kind_ == kSoftmax) RLNAS_DISPATCH(block_backward, shape, weights, from, upstream, kept, to, into);
      if (kind_ == kDotProduct)
        RLNAS_DISPATCH(dot_product_backward, shape, weights, from, upstream, kept, to, into);
      if (kind_ == kConcatenation)
        RLNAS_DISPATCH(concatenation_backward, shape, weights, from, upstream, kept, to, into);
    });
    return gradients;
  }

 private:
  View view(void* data, const Strides& s) const { return {data, dtype_, s[0], s[1], {s[2], s[3], s[4]}}; }

  BlockShape shape_now() const {
    BlockShape shape = shape_;
    shape.deterministic = deterministic();
    shape.threads = threads();
    return shape;
  }

  BlockWeights weights_of(const py::tuple& tensors) const {
    const auto at = [&](size_t i) { return address(tensors[i]); };
    return {dtype_, at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9)};
  }

  BlockSaved places(py::handle saved) const {
    char* const start = static_cast<char*>(address(saved));
    const auto at = [&](size_t i) {
      return reinterpret_cast<float*>(start && saved_[i] >= 0 ? start + saved_[i] : nullptr);
    };
    return {at(0), at(1), at(2), reinterpret_cast<uint8_t*>(at(3)), at(4)};
  }

  int kind_;
  BlockShape shape_;
  DType dtype_;
  Strides x_strides_, z_strides_;
  std::array<int64_t, 5> saved_;
};

}  // namespace

void register_nonlocal_attention(py::module_& module) {
  py::class_<BlockKernel>(module, "BlockKernel")
      .def(py::init<int, const std::array<int64_t, 4>&, const std::array<int64_t, 3>&,
                    const std::array<int64_t, 3>&, bool, int, const Strides&, const Strides&,
                    const std::array<int64_t, 5>&>())
      .def("forward", &BlockKernel::forward)
      .def("backward", &BlockKernel::backward);
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
