// rlnas_fast._torch: calls of the kernels in rlnas_fast._cpu that know PyTorch's tensors and autograd.  It
// serves the one PyTorch that it was compiled against; without it every operator works, small ones more
// slowly.
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/version.h>

#include <string>

#include "torch/lent_memory.h"

namespace py = pybind11;

void register_block_calls(py::module_& module);

PYBIND11_MODULE(_torch, module) {
  const py::str found = py::module_::import("torch").attr("__version__");
  const std::string version = std::string(found);
  if (version.substr(0, version.find_first_not_of("0123456789.")) != TORCH_VERSION)
    throw py::import_error("it was compiled for torch " TORCH_VERSION ", but torch " + version +
                           " is installed");
  module.attr("KERNEL_INTERFACE") = RLNAS_KERNEL_INTERFACE;
  register_block_calls(module);
  module.def(
      "lent",
      [](int64_t count) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(rlnas::lent(count))); },
      py::arg("count"), "float32 [count], not cleared, much of it lent again.");
  module.attr("LENT_FROM") = rlnas::kLentFrom;
}
