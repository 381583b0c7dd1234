// A torch.Tensor seen without PyTorch's headers, for calls that take microseconds.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>

namespace rlnas {

// Where the data of a tensor lie; null for None.
void* address(pybind11::handle tensor);

// Strides in elements of [batch, channel, depth, height, width]; dimensions that a tensor lacks have 0.
std::array<int64_t, 5> strides(pybind11::handle tensor);

// torch.empty_like, or None for None.
pybind11::object empty_like(pybind11::handle tensor);

// What the user has told PyTorch: whether results must be reproducible, and how many threads to use.
bool deterministic();
int threads();

}  // namespace rlnas
