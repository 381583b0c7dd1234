// Calls of the fused block as PyTorch calls its own operators: questions and allocations in C++, and a C++
// node for its gradients.  Between the layers of a network the objects of Python have left the caches, and a
// few dozen of its steps take as long as the products of a small image.
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/custom_class.h>

#include <array>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>

#include "cpu/block_kernel.h"
#include "torch/lent_memory.h"

namespace py = pybind11;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace rlnas {
namespace {

using Tensors = std::array<const at::Tensor*, kBlockTensors>;  // null where absent

// Whether nothing but autograd comes between a call and its kernel: no autocast, no mode that traces, counts
// or transforms operators, and no kernel of another operator around us.
bool unwatched() {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  const auto excluded =
      c10::InferenceMode::is_enabled() ? keys.excluded_ - c10::autograd_dispatch_keyset : keys.excluded_;
  return keys.included_.add(c10::DispatchKey::ADInplaceOrView) == c10::default_included_set &&
         excluded == c10::default_excluded_set;
}

// Whether a tensor is memory of the CPU and nothing else: neither negated nor zero without being written out,
// no imitation, and without a tangent.
bool plain(const at::Tensor& tensor) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet around(
      {DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU});
  return tensor.key_set() - around == c10::DispatchKeySet(DispatchKey::CPU) && !tensor._fw_grad(0).defined();
}

void append(std::string& key, int64_t value) {
  key.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

// Appends sizes, strides and dtype of a tensor or None; false where its memory may not be read at once.
bool append_tensor(PyObject* object, const at::Tensor*& tensor, std::string& key) {
  key.push_back(object == Py_None ? 'n' : 't');
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  tensor = &THPVariable_Unpack(object);
  if (!plain(*tensor)) return false;
  append(key, tensor->dim());
  append(key, static_cast<int64_t>(tensor->scalar_type()));
  for (int64_t i = 0; i < tensor->dim(); i++) {
    append(key, tensor->sizes()[i]);
    append(key, tensor->strides()[i]);
  }
  return true;
}

// Appends None, a bool, an int, a str, or a tuple or list of them; false for anything else.
bool append_option(PyObject* option, std::string& key) {
  const auto number = [&key](char type, int64_t value) {
    key.push_back(type);
    append(key, value);
  };
  if (option == Py_None || PyBool_Check(option)) {
    key.push_back(option == Py_None ? 'n' : option == Py_True ? 't' : 'f');
  } else if (PyLong_CheckExact(option)) {
    int overflow = 0;
    number('i', PyLong_AsLongLongAndOverflow(option, &overflow));
    return overflow == 0;
  } else if (PyUnicode_CheckExact(option)) {
    Py_ssize_t size = 0;
    const char* const text = PyUnicode_AsUTF8AndSize(option, &size);
    if (!text) {  // half of a surrogate pair
      PyErr_Clear();
      return false;
    }
    number('s', size);
    key.append(text, static_cast<size_t>(size));
  } else if (PyTuple_CheckExact(option) || PyList_CheckExact(option)) {
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(option);
    number('l', count);
    for (Py_ssize_t i = 0; i < count; i++)
      if (!append_option(PySequence_Fast_GET_ITEM(option, i), key)) return false;
  } else {
    return false;
  }
  return true;
}

// The arguments of a call: x, theta, phi, g, out, (their four biases), pair, and whatever else tells one
// block from another.
struct Arguments {
  Tensors tensors{};
  std::string key;  // empty where no kernel may be called with them at once

  Arguments(PyObject* const* given, Py_ssize_t count) {
    key.reserve(512);
    if (!read(given, count)) key.clear();
  }

 private:
  bool read(PyObject* const* given, Py_ssize_t count) {
    constexpr Py_ssize_t before = 5, biases = 4;
    if (count < before + 2 || !PyTuple_CheckExact(given[before]) || PyTuple_GET_SIZE(given[before]) != biases)
      return false;
    size_t i = 0;
    for (Py_ssize_t j = 0; j < before; j++)
      if (!append_tensor(given[j], tensors[i++], key)) return false;
    for (Py_ssize_t j = 0; j < biases; j++)
      if (!append_tensor(PyTuple_GET_ITEM(given[before], j), tensors[i++], key)) return false;
    if (!append_tensor(given[before + 1], tensors[i++], key)) return false;
    for (Py_ssize_t j = before + 2; j < count; j++)
      if (!append_option(given[j], key)) return false;
    return tensors[0] != nullptr;
  }
};

template <class Tensor>
BlockPointers pointers(const std::array<Tensor, kBlockTensors>& tensors) {
  BlockPointers to{};
  for (size_t i = 0; i < kBlockTensors; i++)
    if (tensors[i]) to[i] = const_cast<void*>(tensors[i]->const_data_ptr());
  return to;
}

// torch.empty_like, past the dispatcher.
at::Tensor new_like(const at::Tensor& tensor) {
  if (!tensor.is_non_overlapping_and_dense()) return at::empty_like(tensor);
  return at::detail::empty_strided_cpu(tensor.sizes(), tensor.strides(), tensor.scalar_type());
}

// Returns z.  What the backward needs goes to `saved`, unless that is null.
at::Tensor forward(const BlockKernel& kernel, const Tensors& tensors, at::Tensor* saved) {
  const at::AutoDispatchBelowADInplaceOrView below;
  at::Tensor z = new_like(*tensors[0]);
  if (saved) *saved = lent(kernel.saved_size());
  kernel.forward(pointers(tensors), z.mutable_data_ptr(), saved ? saved->mutable_data_ptr() : nullptr,
                 at::globalContext().deterministicAlgorithms(), at::get_num_threads());
  return z;
}

// grad_z, written out if it is not yet.
at::Tensor written(const at::Tensor& grad_z) {
  if (plain(grad_z)) return grad_z;
  const at::Tensor out = grad_z._is_zerotensor() ? at::zeros_like(grad_z) : grad_z.resolve_neg();
  TORCH_CHECK_NOT_IMPLEMENTED(plain(out),
                              "nonlocal_block: the gradient of its result is no plain tensor of the "
                              "CPU (",
                              out.key_set(), "); batched gradients are not supported");
  return out;
}

class NonLocalBlock : public torch::autograd::Function<NonLocalBlock> {
 public:
  // given: those of `tensors` that there are; autograd asks for a list.
  static at::Tensor forward(AutogradContext* context, at::TensorList given, const Tensors& tensors,
                            const SharedBlockKernel& kernel) {
    at::Tensor saved;
    at::Tensor z = rlnas::forward(*kernel, tensors, &saved);
    variable_list kept = given.vec();
    kept.push_back(std::move(saved));
    context->save_for_backward(std::move(kept));
    auto what = c10::make_intrusive<Called>();
    what->kernel = kernel;
    for (size_t i = 0; i < kBlockTensors; i++) what->present[i] = tensors[i] != nullptr;
    context->saved_data["block"] = c10::IValue::make_capsule(std::move(what));
    return z;
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    const variable_list kept = context->get_saved_variables();
    const auto capsule = context->saved_data["block"].toCapsule();
    const Called& what = *static_cast<const Called*>(capsule.get());
    variable_list gradients(kept.size() - 1);
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      const at::Tensor grad_z = written(upstream[0]);
      Tensors tensors{}, into{};
      for (size_t i = 0, j = 0; i < kBlockTensors; i++) {
        if (!what.present[i]) continue;
        gradients[j] = new_like(kept[j]);
        tensors[i] = &kept[j];
        into[i] = &gradients[j++];
      }
      const auto steps = grad_z.strides();
      Strides strides{};
      for (size_t i = 0; i < steps.size(); i++) strides[i < 2 ? i : 5 - steps.size() + i] = steps[i];
      what.kernel->backward(pointers(tensors), kept.back().mutable_data_ptr(),
                            const_cast<void*>(grad_z.const_data_ptr()), strides, pointers(into),
                            at::globalContext().deterministicAlgorithms(), at::get_num_threads());
    }
    if (c10::GradMode::is_enabled()) {  // they must not pass for constants
      for (at::Tensor& gradient : gradients) gradient.requires_grad_();
      gradients = torch::autograd::DelayedError(
                      "trying to differentiate nonlocal_block twice; it can be differentiated once",
                      static_cast<int64_t>(gradients.size()))
                      .apply(std::move(gradients));
    }
    gradients.resize(gradients.size() + 2);  // of what is no tensor
    return gradients;
  }

 private:
  struct Called : torch::CustomClassHolder {
    SharedBlockKernel kernel;
    std::array<bool, kBlockTensors> present;
  };
};

constexpr size_t kMostCalls = 4096;  // layouts remembered

// Kernels by layouts and options; touched with the GIL held.
std::unordered_map<std::string, SharedBlockKernel>& kernels() {
  static auto* const all = new std::unordered_map<std::string, SharedBlockKernel>;
  return *all;
}

// z, or None where no kernel is remembered for such arguments, or somebody watches operators.
PyObject* call_block(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (!unwatched()) Py_RETURN_NONE;
  const Arguments arguments(given, count);
  const auto found = arguments.key.empty() ? kernels().end() : kernels().find(arguments.key);
  if (found == kernels().end()) Py_RETURN_NONE;
  const SharedBlockKernel kernel = found->second;  // another thread may forget it
  at::Tensor z;
  {
    const py::gil_scoped_release released;
    RECORD_FUNCTION("rlnas_fast::nonlocal_block", c10::ArrayRef<const c10::IValue>{});
    bool wanted = false;
    variable_list present;
    if (c10::GradMode::is_enabled()) {
      present.reserve(kBlockTensors + 1);
      for (const at::Tensor* tensor : arguments.tensors) {
        if (!tensor) continue;
        present.push_back(*tensor);
        wanted |= tensor->requires_grad();
      }
    }
    z = wanted ? NonLocalBlock::apply(at::TensorList(present), arguments.tensors, kernel)
               : forward(*kernel, arguments.tensors, nullptr);
  }
  return THPVariable_Wrap(z);
  END_HANDLE_TH_ERRORS
}

// Whether kernels may be called with such arguments at once.
PyObject* serves_block(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  return PyBool_FromLong(unwatched() && !Arguments(given, count).key.empty());
  END_HANDLE_TH_ERRORS
}

// Remembers the kernel, whose capsule is the last argument, for such arguments.
PyObject* remember_block(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count > 0, "remember_block needs a kernel");
  const Arguments arguments(given, count - 1);
  const void* const kernel = PyCapsule_GetPointer(given[count - 1], kBlockKernelCapsule);
  if (!kernel) return nullptr;
  if (!arguments.key.empty()) {
    if (kernels().size() >= kMostCalls) kernels().clear();
    kernels()[arguments.key] = *static_cast<const SharedBlockKernel*>(kernel);
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

}  // namespace
}  // namespace rlnas

void register_block_calls(py::module_& module) {
  const auto function = [](auto* call) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call));
  };
  // Without pybind11's questions about each argument.
  static PyMethodDef methods[] = {
      {"call_block", function(&rlnas::call_block), METH_FASTCALL, nullptr},
      {"serves_block", function(&rlnas::serves_block), METH_FASTCALL, nullptr},
      {"remember_block", function(&rlnas::remember_block), METH_FASTCALL, nullptr},
      {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(module.ptr(), methods)) throw py::error_already_set();
}
