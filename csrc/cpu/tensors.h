// A torch.Tensor seen without PyTorch's headers, for calls that take microseconds.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <string>

namespace rlnas {

// Where the data of a tensor lie; null for None.
void* address(pybind11::handle tensor);

// Strides in elements of [batch, channel, depth, height, width]; dimensions that a tensor lacks have 0.
std::array<int64_t, 5> strides(pybind11::handle tensor);

// Appends sizes, strides and dtype.  False where an address may not be taken: a tensor elsewhere than on the
// CPU, an imitation of one, or one that says it is negated or 0 without being written out.
bool append_layout(pybind11::handle tensor, std::string& key);

bool negated(pybind11::handle tensor);
bool requires_grad(pybind11::handle tensor);

// torch.empty_like, or None for None.
pybind11::object empty_like(pybind11::handle tensor);

// float32 [count], not cleared, and float32 in the memory of a Python buffer.
pybind11::object empty_floats(int64_t count);
pybind11::object floats_in(pybind11::handle buffer);

// Whether nobody traces, counts or transforms operators, so that kernels may be called at once.
bool unwatched();

// What the user has told PyTorch: whether results must be reproducible, how many threads to use, and whether
// gradients may be wanted.
bool deterministic();
int threads();
bool grad_enabled();

}  // namespace rlnas
