// Binds the fused blocks; the caller has checked shapes.
#include "cpu/block_kernel.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <utility>

#include "cpu/concatenation.h"
#include "cpu/nonlocal_attention.h"

namespace py = pybind11;
using namespace rlnas;

namespace {

enum Kind { kSoftmax, kDotProduct, kConcatenation };  // as in rlnas_fast/ops/nonlocal_attention/cpu.py

class FusedBlock final : public BlockKernel {
 public:
  // saved: where the parts of BlockSaved begin in float32 [saved_size], in bytes; -1 for what is absent.
  FusedBlock(int kind, const std::array<int64_t, 4>& sizes, const std::array<int64_t, 3>& space,
             const std::array<int64_t, 3>& pool, bool residual, int dtype, const Strides& x_strides,
             const Strides& z_strides, const std::array<int64_t, 5>& saved, int64_t saved_size)
      : kind_(kind),
        shape_{sizes[0],
               sizes[1],
               sizes[2],
               sizes[3],
               {space[0], space[1], space[2]},
               {pool[0], pool[1], pool[2]},
               residual,
               false,
               1},
        dtype_(static_cast<DType>(dtype)),
        x_strides_(x_strides),
        z_strides_(z_strides),
        saved_(saved),
        saved_size_(saved_size) {}

  int64_t saved_size() const override { return saved_size_; }

  void forward(const BlockPointers& tensors, void* z, void* saved, bool deterministic,
               int threads) const override {
    const View from = view(tensors[0], x_strides_), to = view(z, z_strides_);
    const BlockWeights weights = weights_of(tensors);
    const BlockSaved kept = places(saved);
    const BlockShape shape = shape_for(deterministic, threads);
    if (kind_ == kSoftmax) RLNAS_DISPATCH(block_forward, shape, weights, from, to, kept);
    if (kind_ == kDotProduct) RLNAS_DISPATCH(dot_product_forward, shape, weights, from, to, kept);
    if (kind_ == kConcatenation) RLNAS_DISPATCH(concatenation_forward, shape, weights, from, to, kept);
  }

  void backward(const BlockPointers& tensors, void* saved, void* grad_z, const Strides& strides,
                const BlockPointers& gradients, bool deterministic, int threads) const override {
    const View from = view(tensors[0], x_strides_), to = view(gradients[0], z_strides_);
    const View upstream = view(grad_z, strides);
    const BlockWeights weights = weights_of(tensors);
    const BlockGradients into{gradients[1], gradients[2], gradients[3], gradients[4], gradients[5],
                              gradients[6], gradients[7], gradients[8], gradients[9]};
    const BlockSaved kept = places(saved);
    const BlockShape shape = shape_for(deterministic, threads);
    if (kind_ == kSoftmax) RLNAS_DISPATCH(block_backward, shape, weights, from, upstream, kept, to, into);
    if (kind_ == kDotProduct)
      RLNAS_DISPATCH(dot_product_backward, shape, weights, from, upstream, kept, to, into);
    if (kind_ == kConcatenation)
      RLNAS_DISPATCH(concatenation_backward, shape, weights, from, upstream, kept, to, into);
  }

 private:
  View view(void* data, const Strides& s) const { return {data, dtype_, s[0], s[1], {s[2], s[3], s[4]}}; }

  BlockShape shape_for(bool deterministic, int threads) const {
    BlockShape shape = shape_;
    shape.deterministic = deterministic;
    shape.threads = threads;
    return shape;
  }

  BlockWeights weights_of(const BlockPointers& t) const {
    return {dtype_, t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9]};
  }

  BlockSaved places(void* saved) const {
    char* const start = static_cast<char*>(saved);
    const auto at = [&](size_t i) {
      return reinterpret_cast<float*>(start && saved_[i] >= 0 ? start + saved_[i] : nullptr);
    };
    return {at(0), at(1), at(2), reinterpret_cast<uint8_t*>(at(3)), at(4)};
  }

  int kind_;
  BlockShape shape_;
  DType dtype_;
  Strides x_strides_, z_strides_;
  std::array<int64_t, 5> saved_;
  int64_t saved_size_;
};

using Addresses = std::array<uintptr_t, kBlockTensors>;  // 0 where absent

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

BlockPointers pointers(const Addresses& addresses) {
  BlockPointers to{};
  for (size_t i = 0; i < kBlockTensors; i++) to[i] = at(addresses[i]);
  return to;
}

}  // namespace

void register_block_kernel(py::module_& module) {
  py::class_<BlockKernel, std::shared_ptr<BlockKernel>>(module, "BlockKernel")
      .def(py::init([](int kind, const std::array<int64_t, 4>& sizes, const std::array<int64_t, 3>& space,
                       const std::array<int64_t, 3>& pool, bool residual, int dtype, const Strides& x_strides,
                       const Strides& z_strides, const std::array<int64_t, 5>& saved,
                       int64_t saved_size) -> std::shared_ptr<BlockKernel> {
        return std::make_shared<FusedBlock>(kind, sizes, space, pool, residual, dtype, x_strides, z_strides,
                                            saved, saved_size);
      }))
      .def_property_readonly("saved_size", &BlockKernel::saved_size)
      .def("capsule",
           [](std::shared_ptr<BlockKernel> self) {
             auto shared = std::make_unique<SharedBlockKernel>(std::move(self));
             py::capsule capsule(shared.get(), kBlockKernelCapsule, [](PyObject* owner) {
               delete static_cast<SharedBlockKernel*>(PyCapsule_GetPointer(owner, kBlockKernelCapsule));
             });
             shared.release();
             return capsule;
           })
      .def("forward",
           [](const BlockKernel& self, const Addresses& tensors, uintptr_t z, uintptr_t saved,
              bool deterministic, int threads) {
             const py::gil_scoped_release release;
             self.forward(pointers(tensors), at(z), at(saved), deterministic, threads);
           })
      .def("backward",
           [](const BlockKernel& self, const Addresses& tensors, uintptr_t saved, uintptr_t grad_z,
              const Strides& strides, const Addresses& gradients, bool deterministic, int threads) {
             const py::gil_scoped_release release;
             self.backward(pointers(tensors), at(saved), at(grad_z), strides, pointers(gradients),
                           deterministic, threads);
           });
}
