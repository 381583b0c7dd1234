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

// Parts of torch; all of them live as long as the process.
struct Known {
  PyObject *tensor, *parameter;       // types
  PyObject *strided, *float32, *cpu;  // the layout, the dtype, the device
  PyObject *empty, *empty_like, *frombuffer, *deterministic, *threads, *grad_enabled;  // functions
  PyObject* watchers[3];  // functions that say 0 or False where nobody looks on
  PyObject *forward_ad, *level, *is_neg, *requires_grad;  // a module, and names
  const DlExchange* exchange;
} known;

DlTensor viewed(py::handle tensor) {
  DlTensor view{};
  if (known.exchange->view(tensor.ptr(), &view)) throw py::error_already_set();
  return view;
}

py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}
py::object called(PyObject* function) { return checked(PyObject_CallNoArgs(function)); }

py::object asked(py::handle tensor, const char* method) { return tensor.attr(method)(); }

void append(std::string& key, int64_t value) {
  key.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

// Parts of torch by name, and the table of C functions or None.
void learn_torch(const py::object& torch, const py::object& table) {
  const auto part = [](const py::object& of, const char* name) {
    return py::object(of.attr(name)).release().ptr();
  };
  const py::object c = torch.attr("_C");
  known = {part(torch, "Tensor"),
           part(torch.attr("nn"), "Parameter"),
           part(torch, "strided"),
           part(torch, "float32"),
           torch.attr("device")("cpu").release().ptr(),
           part(torch, "empty"),
           part(torch, "empty_like"),
           part(torch, "frombuffer"),
           part(c, "_get_deterministic_algorithms"),
           part(torch, "get_num_threads"),
           part(torch, "is_grad_enabled"),
           {part(c, "_len_torch_dispatch_stack"), part(c, "_is_tracing"),
            part(c, "_are_functorch_transforms_active")},
           part(torch.attr("autograd"), "forward_ad"),
           PyUnicode_InternFromString("_current_level"),
           PyUnicode_InternFromString("is_neg"),
           PyUnicode_InternFromString("requires_grad"),
           nullptr};
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
  return checked(PyObject_CallOneArg(known.empty_like, tensor.ptr()));
}

py::object empty_floats(int64_t count) {  // on the CPU whatever device is the default
  const py::int_ size(count);
  PyObject* const arguments[] = {size.ptr(), known.float32, known.cpu};
  static PyObject* const names = py::make_tuple("dtype", "device").release().ptr();
  return checked(PyObject_Vectorcall(known.empty, arguments, 1, names));
}

py::object floats_in(py::handle buffer) {
  PyObject* const arguments[] = {buffer.ptr(), known.float32};
  static PyObject* const names = py::make_tuple("dtype").release().ptr();
  return checked(PyObject_Vectorcall(known.frombuffer, arguments, 1, names));
}

bool negated(py::handle tensor) {
  return checked(PyObject_CallMethodNoArgs(tensor.ptr(), known.is_neg)).ptr() == Py_True;
}

bool requires_grad(py::handle tensor) {
  return checked(PyObject_GetAttr(tensor.ptr(), known.requires_grad)).ptr() == Py_True;
}

bool append_layout(py::handle tensor, std::string& key) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
  if ((type != known.tensor && type != known.parameter) || negated(tensor)) return false;
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

bool unwatched() {
  for (PyObject* const watcher : known.watchers) {
    const int watches = PyObject_IsTrue(called(watcher).ptr());
    if (watches < 0) throw py::error_already_set();
    if (watches) return false;
  }
  return checked(PyObject_GetAttr(known.forward_ad, known.level)).cast<int>() < 0;
}

bool deterministic() { return called(known.deterministic).ptr() == Py_True; }
int threads() { return called(known.threads).cast<int>(); }
bool grad_enabled() { return called(known.grad_enabled).ptr() == Py_True; }

}  // namespace rlnas

void register_tensors(py::module_& module) {
  module.def("learn_torch", &rlnas::learn_torch, py::arg("torch"), py::arg("table").none(true));
}
