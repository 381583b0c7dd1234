// A fused block for tensors of one layout: sizes, strides and offsets are worked out once.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace rlnas {

constexpr size_t kBlockTensors = 10;  // x, theta, phi, g, out, their biases, and the pair; null where absent
using BlockPointers = std::array<void*, kBlockTensors>;
using Strides = std::array<int64_t, 5>;  // batch, channel, depth, height, width

// Virtual, because the module that knows PyTorch calls it without being linked to this one.
class BlockKernel {
 public:
  virtual ~BlockKernel() = default;

  // Number of float32 that a forward keeps for its backward.
  virtual int64_t saved_size() const = 0;

  // Writes z and, where not null, what the backward needs.
  virtual void forward(const BlockPointers& tensors, void* z, void* saved, bool deterministic,
                       int threads) const = 0;

  // Writes the gradients of all tensors that there are.  `strides` are those of grad_z.
  virtual void backward(const BlockPointers& tensors, void* saved, void* grad_z, const Strides& strides,
                        const BlockPointers& gradients, bool deterministic, int threads) const = 0;
};

// Name of a Python capsule of SharedBlockKernel*, in which a kernel goes from one module to another.
using SharedBlockKernel = std::shared_ptr<const BlockKernel>;
constexpr const char* kBlockKernelCapsule = "rlnas_fast.BlockKernel";

}  // namespace rlnas
