// What Python sees of csrc/cuda/masked_matmul.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cuda/masked_matmul.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

rlnas::MaskPointers mask_pointers(const std::array<uintptr_t, 11>& a) {
  return {pointer<uint8_t>(a[0]),       pointer<uint32_t>(a[1]),      pointer<int32_t>(a[2]),
          pointer<int32_t>(a[3]),       pointer<int32_t>(a[4]),       pointer<int32_t>(a[5]),
          pointer<int64_t>(a[6]),       pointer<const int8_t>(a[7]),  pointer<const float>(a[8]),
          pointer<const int32_t>(a[9]), pointer<const int32_t>(a[10])};
}

rlnas::MaskSizes mask_sizes(const std::array<int, 4>& a) {
  const auto [rows, columns, tile_rows, tile_columns] = a;
  return {rows,
          columns,
          tile_rows,
          tile_columns,
          (rows + tile_rows - 1) / tile_rows,
          (columns + tile_columns - 1) / tile_columns,
          (columns + 31) / 32};
}

rlnas::ProductPointers product_pointers(const std::array<uintptr_t, 4>& a) {
  return {pointer<const void>(a[0]), pointer<const void>(a[1]), pointer<const void>(a[2]),
          pointer<void>(a[3])};
}

cudaStream_t stream_of(uintptr_t handle) { return pointer<CUstream_st>(handle); }

}  // namespace

void register_masked_matmul(py::module_& module) {
  using Mask = std::array<uintptr_t, 11>;
  using Sizes = std::array<int, 4>;
  using Product = std::array<uintptr_t, 4>;
  module.def(
      "masked_matmul_update",
      [](uintptr_t dense, const Mask& mask, const Sizes& sizes, uintptr_t stream) {
        rlnas::update_mask(pointer<const uint8_t>(dense), mask_pointers(mask), mask_sizes(sizes),
                           stream_of(stream));
      },
      "Counts, lists and stats from state and bits; with a bool [N, K] first bits and state from that.");
  module.def(
      "masked_matmul_few_rows",
      [](const Product& product, const Mask& mask, const Sizes& sizes, int batch, int64_t x_stride,
         int element, uintptr_t stream) {
        rlnas::few_rows(product_pointers(product), mask_pointers(mask), mask_sizes(sizes), batch, x_stride,
                        static_cast<rlnas::Element>(element), stream_of(stream));
      },
      "y for 1 to 8 rows of x.");
  module.def(
      "masked_matmul_hopper_tiles",
      [](const Product& product, const Mask& mask, const Sizes& sizes, int batch, int64_t x_stride,
         int element, uintptr_t stream, bool transposed, std::array<int, 2> cluster) {
        rlnas::hopper_tiles(product_pointers(product), mask_pointers(mask), mask_sizes(sizes), batch,
                            x_stride, static_cast<rlnas::Element>(element), transposed,
                            {cluster[0], cluster[1]}, stream_of(stream));
      },
      "y by wgmma over lists of 64- and 128-tiles.");
}
