// Reads tensors through the table of C functions that a framework offers for DLPack (structures as in DLPack
// 1.x), or, where this PyTorch has none, by asking the objects.
#include "cpu/tensors.h"

#include <string>

namespace py = pybind11;

namespace rlnas {
namespace {

struct DlTensor {
  void* data;
  int32_t device_type, device_id, dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t* sizes;
  const int64_t* strides;
  uint64_t byte_offset;
};

struct DlExchange {
  uint32_t major, minor;
  const void* previous;
  const void *allocate, *to_managed, *from_managed;
  int (*view)(void* object, DlTensor* to);
};

constexpr int32_t kCpu = 1;

struct Known {
  PyObject *tensor = nullptr, *parameter = nullptr;  // types; all of this lives as long as the process
  PyObject* strided = nullptr;                       // the layout
  PyObject* is_neg = nullptr;                        // a method's name
  const DlExchange* exchange = nullptr;
  PyObject *empty_like = nullptr, *deterministic = nullptr, *threads = nullptr;  // functions
} known;

DlTensor viewed(py::handle tensor) {
  DlTensor view{};
  if (known.exchange->view(tensor.ptr(), &view)) throw py::error_already_set();
  return view;
}

py::object called(PyObject* function) {
  auto result = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(function));
  if (!result) throw py::error_already_set();
  return result;
}

py::object asked(py::handle tensor, const char* method) { return tensor.attr(method)(); }

void append(std::string& key, int64_t value) {
  key.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

// Appends sizes, strides and dtype; false for what is not a plain tensor of this CPU.
bool describe(py::handle tensor, std::string& key) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
  if (type != known.tensor && type != known.parameter) return false;
  const py::object negated =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), known.is_neg));
  if (!negated) throw py::error_already_set();
  if (negated.ptr() == Py_True) return false;
  if (known.exchange) {
    DlTensor view{};
    if (known.exchange->view(tensor.ptr(), &view)) {  // no strides, or a device without memory
      PyErr_Clear();
      return false;
    }
    int64_t count = 1;
    append(key, view.dimensions);
    append(key, view.code * 256 + view.bits);
    for (int i = 0; i < view.dimensions; i++) {
      append(key, view.sizes[i]);
      append(key, view.strides[i]);
      count *= view.sizes[i];
    }
    return view.device_type == kCpu && (view.data || count == 0);
  }
  if (tensor.attr("layout").ptr() != known.strided) return false;
  const py::tuple sizes = tensor.attr("shape"), steps = asked(tensor, "stride");
  append(key, static_cast<int64_t>(sizes.size()));
  append(key, reinterpret_cast<intptr_t>(tensor.attr("dtype").ptr()));
  for (size_t i = 0; i < sizes.size(); i++) {
    append(key, sizes[i].cast<int64_t>());
    append(key, steps[i].cast<int64_t>());
  }
  return tensor.attr("is_cpu").ptr() == Py_True && asked(tensor, "_is_zerotensor").ptr() == Py_False;
}

// The layouts of tensors, each perhaps None, as bytes to look up a call by; None if one is not plain.
py::object layout_key(const py::tuple& tensors) {
  std::string key;
  key.reserve(512);
  for (const py::handle tensor : tensors) {
    if (tensor.is_none())
      append(key, -1);
    else if (!describe(tensor, key))
      return py::none();
  }
  return py::bytes(key);
}

// The types and the layout of plain tensors, the table of C functions or None, and functions of torch.
void learn_tensors(const py::type& tensor, const py::type& parameter, const py::object& strided,
                   const py::object& table, const py::object& empty_like, const py::object& deterministic,
                   const py::object& threads) {
  known = {tensor.ptr(),
           parameter.ptr(),
           strided.ptr(),
           PyUnicode_InternFromString("is_neg"),
           nullptr,
           empty_like.inc_ref().ptr(),
           deterministic.inc_ref().ptr(),
           threads.inc_ref().ptr()};
  if (table.is_none()) return;
  const auto* exchange =
      static_cast<const DlExchange*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
  if (!exchange) throw py::error_already_set();
  if (exchange->major == 1 && exchange->view) known.exchange = exchange;
}

}  // namespace

void* address(py::handle tensor) {
  if (tensor.is_none()) return nullptr;
  if (!known.exchange) return reinterpret_cast<void*>(asked(tensor, "data_ptr").cast<uintptr_t>());
  const DlTensor view = viewed(tensor);
  return static_cast<char*>(view.data) + view.byte_offset;
}

std::array<int64_t, 5> strides(py::handle tensor) {
  std::array<int64_t, 5> to{};
  const auto fill = [&](int count, auto stride) {
    for (int i = 0; i < count; i++) to[i < 2 ? i : 5 - count + i] = stride(i);
  };
  if (known.exchange) {
    const DlTensor view = viewed(tensor);
    fill(view.dimensions, [&](int i) { return view.strides[i]; });
  } else {
    const py::tuple steps = asked(tensor, "stride");
    fill(static_cast<int>(steps.size()), [&](int i) { return steps[i].cast<int64_t>(); });
  }
  return to;
}

py::object empty_like(py::handle tensor) {
  if (tensor.is_none()) return py::none();
  auto result = py::reinterpret_steal<py::object>(PyObject_CallOneArg(known.empty_like, tensor.ptr()));
  if (!result) throw py::error_already_set();
  return result;
}

bool deterministic() { return called(known.deterministic).ptr() == Py_True; }
int threads() { return called(known.threads).cast<int>(); }

}  // namespace rlnas

void register_tensors(py::module_& module) {
  module.def("learn_tensors", &rlnas::learn_tensors, py::arg("tensor"), py::arg("parameter"),
             py::arg("strided"), py::arg("table").none(true), py::arg("empty_like"), py::arg("deterministic"),
             py::arg("threads"));
  module.def("layout_key", &rlnas::layout_key, py::arg("tensors"));
}
