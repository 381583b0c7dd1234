// rlnas_fast._cpu: kernels on raw pointers, sizes and strides.  Callers own the memory and check shapes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"

namespace py = pybind11;

// Each operation binds itself, in the file that checks and dispatches it.
void register_nonlocal_attention(py::module_& module);
void register_block_kernel(py::module_& module);
void register_concatenation(py::module_& module);
void register_masked_matmul(py::module_& module);
void register_activation_statistics(py::module_& module);

PYBIND11_MODULE(_cpu, module) {
  module.def("set_isa", &rlnas::set_isa, py::arg("name"), "Forces an instruction set; \"auto\" undoes it.");
  module.def("isa", [] { return rlnas::isa_name(rlnas::active_isa()); }, "The instruction set in use.");
  module.def("usable_isas", &rlnas::usable_isas, "The instruction sets of this CPU that kernels exist for.");
  module.attr("KERNEL_INTERFACE") = RLNAS_KERNEL_INTERFACE;
  register_nonlocal_attention(module);
  register_block_kernel(module);
  register_concatenation(module);
  register_masked_matmul(module);
  register_activation_statistics(module);
}
