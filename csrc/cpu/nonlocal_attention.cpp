// Checks and dispatches the non-local attention kernels.
#include <pybind11/pybind11.h>

void register_nonlocal_attention(pybind11::module_&) {}
