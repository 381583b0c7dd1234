// Memory that a forward keeps for its backward.
#pragma once

#include <ATen/core/Tensor.h>

namespace rlnas {

constexpr int64_t kLentFrom =
    1 << 20;  // float32; what is less lies where the call before left it, in the caches

// float32 [count] of the CPU, not cleared; from kLentFrom on in memory that is lent again and again.
at::Tensor lent(int64_t count);

}  // namespace rlnas
