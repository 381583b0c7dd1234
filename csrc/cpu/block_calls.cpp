// Calls of the fused block, with what Python would have to ask before each: between the layers of a network
// its objects have left the caches, and a few dozen of its steps take as long as the products of a small
// image.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <unordered_map>
#include <utility>

#include "cpu/concatenation.h"
#include "cpu/lent_memory.h"
#include "cpu/nonlocal_attention.h"
#include "cpu/tensors.h"

namespace py = pybind11;
using namespace rlnas;

namespace {

enum Kind { kSoftmax, kDotProduct, kConcatenation };  // as in rlnas_fast/ops/nonlocal_attention/cpu.py
using Strides = std::array<int64_t, 5>;               // batch, channel, depth, height, width
constexpr size_t kTensors = 10;      // x, theta, phi, g, out, their biases, and the pair; some are None
constexpr size_t kMostCalls = 4096;  // layouts remembered

// Runs the task while other threads may run Python.
template <class F>
void unlocked(F task) {
  const py::gil_scoped_release release;
  task();
}

// A fused block for tensors of one layout.
class BlockKernel {
 public:
  // saved: where the parts of BlockSaved begin in float32 [saved_size], in bytes; -1 for what is absent.
  BlockKernel(int kind, const std::array<int64_t, 4>& sizes, const std::array<int64_t, 3>& space,
              const std::array<int64_t, 3>& pool, bool residual, int dtype, const Strides& x_strides,
              const Strides& z_strides, const std::array<int64_t, 5>& saved, int64_t saved_size)
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
        saved_(saved),
        saved_size_(saved_size) {}

  // Returns z and, if `save`, what the backward needs, else None; gaps within it are 0 if `clean`.
  std::pair<py::object, py::object> forward(const py::tuple& tensors, bool save, bool clean) const {
    py::object z = empty_like(tensors[0]), saved = save ? lent(saved_size_) : py::none();
    if (save && clean) saved.attr("zero_")();
    const View from = view(address(tensors[0]), x_strides_), to = view(address(z), z_strides_);
    const BlockWeights weights = weights_of(tensors);
    const BlockSaved kept = places(saved);
    const BlockShape shape = shape_now();
    unlocked([&] {
      if (kind_ == kSoftmax) RLNAS_DISPATCH(block_forward, shape, weights, from, to, kept);
      if (kind_ == kDotProduct) RLNAS_DISPATCH(dot_product_forward, shape, weights, from, to, kept);
      if (kind_ == kConcatenation) RLNAS_DISPATCH(concatenation_forward, shape, weights, from, to, kept);
    });
    return {std::move(z), std::move(saved)};
  }

  // Returns the gradients of the tensors, in their order, behind `others` None.
  py::tuple backward(py::handle grad_z, const py::tuple& tensors, py::handle saved, size_t others) const {
    py::tuple gradients(others + kTensors);
    for (size_t i = 0; i < others; i++) gradients[i] = py::none();
    for (size_t i = 0; i < kTensors; i++) gradients[others + i] = empty_like(tensors[i]);
    const py::object plain =
        negated(grad_z) ? grad_z.attr("resolve_neg")() : py::reinterpret_borrow<py::object>(grad_z);
    const auto at = [&](size_t i) { return address(gradients[others + i]); };
    const View from = view(address(tensors[0]), x_strides_), to = view(at(0), z_strides_);
    const View upstream = view(address(plain), strides(plain));
    const BlockWeights weights = weights_of(tensors);
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
  int64_t saved_size_;
};

// Appends None, a bool, an int, a str, or a tuple or list of them; false for anything else.
bool append_option(py::handle option, std::string& key) {
  PyObject* const o = option.ptr();
  const auto number = [&key](char type, int64_t value) {
    key.push_back(type);
    key.append(reinterpret_cast<const char*>(&value), sizeof(value));
  };
  if (o == Py_None || PyBool_Check(o)) {
    key.push_back(o == Py_None ? 'n' : o == Py_True ? 't' : 'f');
  } else if (PyLong_CheckExact(o)) {
    int overflow = 0;
    number('i', PyLong_AsLongLongAndOverflow(o, &overflow));
    return overflow == 0;
  } else if (PyUnicode_CheckExact(o)) {
    Py_ssize_t size = 0;
    const char* const text = PyUnicode_AsUTF8AndSize(o, &size);
    if (!text) {  // half of a surrogate pair
      PyErr_Clear();
      return false;
    }
    number('s', size);
    key.append(text, static_cast<size_t>(size));
  } else if (PyTuple_CheckExact(o) || PyList_CheckExact(o)) {
    number('l', static_cast<int64_t>(py::len(option)));
    for (const py::handle each : option)
      if (!append_option(each, key)) return false;
  } else {
    return false;
  }
  return true;
}

// Layouts of tensors, each perhaps None, and the options of a block; empty if one is not plain.
std::string key_of(const py::tuple& tensors, const py::tuple& options) {
  std::string key;
  key.reserve(512);
  for (const py::handle tensor : tensors) {
    key.push_back(tensor.is_none() ? 'n' : 't');
    if (!tensor.is_none() && !append_layout(tensor, key)) return {};
  }
  return append_option(options, key) ? key : std::string();
}

// The kernels of blocks by layouts and options.
class BlockCalls {
 public:
  // apply: of an autograd.Function with `forward` and `backward` of this object; once: that backward where
  // its own gradient may be wanted.
  void bind(py::object apply, py::object once) {
    apply_ = std::move(apply);
    once_ = std::move(once);
  }

  // Whether kernels may be called with these tensors at once.
  bool serves(const py::tuple& tensors) const { return unwatched() && !key_of(tensors, py::tuple()).empty(); }

  // The kernel remembered, or None.
  py::object find(const py::tuple& tensors, const py::tuple& options) const {
    const std::string key = key_of(tensors, options);
    const auto found = key.empty() ? kernels_.end() : kernels_.find(key);
    return found == kernels_.end() ? py::none() : found->second;
  }

  // Remembers a kernel; not for tensors that are not plain.
  void add(const py::tuple& tensors, const py::tuple& options, const py::object& kernel) {
    const std::string key = key_of(tensors, options);
    if (key.empty()) return;
    if (kernels_.size() >= kMostCalls) kernels_.clear();
    kernels_[key] = kernel;
  }

  // z, or None where no kernel is known or somebody watches operators.
  py::object call(const py::tuple& tensors, const py::tuple& options) const {
    if (!unwatched()) return py::none();
    const py::object kernel = find(tensors, options);
    if (kernel.is_none()) return kernel;
    if (grad_enabled())
      for (const py::handle tensor : tensors)
        if (!tensor.is_none() && requires_grad(tensor)) return apply_(kernel, *tensors);
    return kernel.cast<const BlockKernel&>().forward(tensors, false, false).first;
  }

  py::object forward(py::object context, const py::object& kernel, const py::args& tensors) const {
    auto [z, saved] = kernel.cast<const BlockKernel&>().forward(tensors, true, false);
    context.attr("save_for_backward")(*tensors, saved);
    context.attr("kernel") = kernel;
    return z;
  }

  py::object backward(const py::object& context, const py::object& grad_z) const {
    if (grad_enabled()) return once_(context, grad_z);
    const py::tuple kept = context.attr("saved_tensors");
    const py::object kernel = context.attr("kernel");
    return kernel.cast<const BlockKernel&>().backward(grad_z, kept, kept[kTensors], 1);
  }

 private:
  py::object apply_, once_;
  std::unordered_map<std::string, py::object> kernels_;
};

}  // namespace

void register_block_calls(py::module_& module) {
  py::class_<BlockKernel>(module, "BlockKernel")
      .def(py::init<int, const std::array<int64_t, 4>&, const std::array<int64_t, 3>&,
                    const std::array<int64_t, 3>&, bool, int, const Strides&, const Strides&,
                    const std::array<int64_t, 5>&, int64_t>())
      .def("forward", &BlockKernel::forward, py::arg("tensors"), py::arg("save"), py::arg("clean") = false)
      .def("backward", &BlockKernel::backward, py::arg("grad_z"), py::arg("tensors"), py::arg("saved"),
           py::arg("others") = 0);
  py::class_<BlockCalls>(module, "BlockCalls")
      .def(py::init<>())
      .def("bind", &BlockCalls::bind, py::arg("apply"), py::arg("once"))
      .def("serves", &BlockCalls::serves, py::arg("tensors"))
      .def("find", &BlockCalls::find, py::arg("tensors"), py::arg("options"))
      .def("add", &BlockCalls::add, py::arg("tensors"), py::arg("options"), py::arg("kernel"))
      .def("call", &BlockCalls::call, py::arg("tensors"), py::arg("options"))
      .def("forward", &BlockCalls::forward)
      .def("backward", &BlockCalls::backward);
}
