// Binds the non-local kernels: pointers and strides in, nothing returned; the caller has checked shapes.
#include "cpu/nonlocal_attention.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/concatenation.h"

namespace py = pybind11;
using namespace rlnas;

namespace {

enum Kind { kSoftmax, kDotProduct, kConcatenation };  // as in rlnas_fast/ops/nonlocal_attention/cpu.py
using Pointer = std::uintptr_t;
using Strides = std::array<int64_t, 5>;  // batch, channel, depth, height, width
using Pointers5 = std::array<Pointer, 5>;
using Pointers9 = std::array<Pointer, 9>;

View view(Pointer data, int dtype, const Strides& s) {
  return {reinterpret_cast<void*>(data), static_cast<DType>(dtype), s[0], s[1], {s[2], s[3], s[4]}};
}

View line(Pointer data, int dtype, const std::array<int64_t, 3>& s) {  // [batch, channel, position]
  return {reinterpret_cast<void*>(data), static_cast<DType>(dtype), s[0], s[1], {0, 0, s[2]}};
}

BlockShape block_shape(const std::array<int64_t, 4>& sizes, const std::array<int64_t, 3>& space,
                       const std::array<int64_t, 3>& pool, bool residual, bool deterministic, int threads) {
  return {sizes[0],
          sizes[1],
          sizes[2],
          sizes[3],
          {space[0], space[1], space[2]},
          {pool[0], pool[1], pool[2]},
          residual,
          deterministic,
          threads};
}

BlockWeights block_weights(int dtype, const Pointers9& p) {
  const auto at = [&](int i) { return reinterpret_cast<const void*>(p[i]); };
  return {static_cast<DType>(dtype), at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)};
}

BlockSaved block_saved(const Pointers5& p) {
  const auto at = [&](int i) { return reinterpret_cast<float*>(p[i]); };
  return {at(0), at(1), at(2), reinterpret_cast<uint8_t*>(p[3]), at(4)};
}

}  // namespace

void register_nonlocal_attention(py::module_& module) {
  module.def(
      "nonlocal_block_forward",
      [](int kind, std::array<int64_t, 4> sizes, std::array<int64_t, 3> space, std::array<int64_t, 3> pool,
         bool residual, bool deterministic, int threads, int dtype, const Pointers9& weights, Pointer x,
         Strides x_strides, Pointer z, Strides z_strides, const Pointers5& saved) {
        const py::gil_scoped_release release;
        const BlockShape shape = block_shape(sizes, space, pool, residual, deterministic, threads);
        const BlockWeights given = block_weights(dtype, weights);
        const View from = view(x, dtype, x_strides), to = view(z, dtype, z_strides);
        if (kind == kSoftmax) RLNAS_DISPATCH(block_forward, shape, given, from, to, block_saved(saved));
        if (kind == kDotProduct)
          RLNAS_DISPATCH(dot_product_forward, shape, given, from, to, block_saved(saved));
        if (kind == kConcatenation)
          RLNAS_DISPATCH(concatenation_forward, shape, given, from, to, block_saved(saved));
      });
  module.def(
      "nonlocal_block_backward",
      [](int kind, std::array<int64_t, 4> sizes, std::array<int64_t, 3> space, std::array<int64_t, 3> pool,
         bool residual, bool deterministic, int threads, int dtype, const Pointers9& weights, Pointer x,
         Strides x_strides, Pointer grad_z, Strides grad_z_strides, const Pointers5& saved, Pointer grad_x,
         Strides grad_x_strides, const Pointers9& gradients) {
        const py::gil_scoped_release release;
        const BlockShape shape = block_shape(sizes, space, pool, residual, deterministic, threads);
        const auto at = [&](int i) { return reinterpret_cast<void*>(gradients[i]); };
        const BlockWeights given = block_weights(dtype, weights);
        const View from = view(x, dtype, x_strides), upstream = view(grad_z, dtype, grad_z_strides);
        const View to = view(grad_x, dtype, grad_x_strides);
        const BlockGradients into{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)};
        const BlockSaved kept = block_saved(saved);
        if (kind == kSoftmax) RLNAS_DISPATCH(block_backward, shape, given, from, upstream, kept, to, into);
        if (kind == kDotProduct)
          RLNAS_DISPATCH(dot_product_backward, shape, given, from, upstream, kept, to, into);
        if (kind == kConcatenation)
          RLNAS_DISPATCH(concatenation_backward, shape, given, from, upstream, kept, to, into);
      });
  module.def(
      "nonlocal_attention_forward", [](std::array<int64_t, 5> sizes, bool deterministic, int threads,
                                       int dtype, const std::array<Pointer, 4>& data,
                                       const std::array<std::array<int64_t, 3>, 4>& strides, Pointer lse) {
        const py::gil_scoped_release release;
        const AttentionShape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], deterministic, threads};
        const auto at = [&](int i) { return line(data[i], dtype, strides[i]); };
        RLNAS_DISPATCH(attention_forward, shape, at(0), at(1), at(2), at(3), reinterpret_cast<float*>(lse));
      });
  module.def(
      "nonlocal_attention_backward", [](std::array<int64_t, 5> sizes, bool deterministic, int threads,
                                        int dtype, const std::array<Pointer, 8>& data,
                                        const std::array<std::array<int64_t, 3>, 8>& strides, Pointer lse) {
        const py::gil_scoped_release release;
        const AttentionShape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], deterministic, threads};
        const auto at = [&](int i) { return line(data[i], dtype, strides[i]); };
        RLNAS_DISPATCH(attention_backward, shape, at(0), at(1), at(2), at(3),
                       reinterpret_cast<const float*>(lse), at(4), at(5), at(6), at(7));
      });
}
