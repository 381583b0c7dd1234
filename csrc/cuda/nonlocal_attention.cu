// Launches of nonlocal_attention.
#include <pybind11/pybind11.h>

void register_nonlocal_attention(pybind11::module_&) {}
