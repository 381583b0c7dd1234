// Memory that a forward keeps for its backward.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace rlnas {

// A tensor of float32 [count], not cleared; much comes from memory that goes from each holder to the next.
pybind11::object lent(int64_t count);

}  // namespace rlnas
