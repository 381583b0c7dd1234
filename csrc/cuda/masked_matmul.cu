// Launches of masked_matmul.
#include <pybind11/pybind11.h>

void register_masked_matmul(pybind11::module_&) {}
