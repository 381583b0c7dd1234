// Binds and dispatches the masked matrix product.  Python owns the memory and has checked every shape.
#include "cpu/masked_matmul.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>

namespace py = pybind11;

namespace rlnas {
namespace {

using Address = uintptr_t;  // of a contiguous tensor; 0: absent

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// (data, dtype, rows, columns, stride of a row)
using MatrixArgs = std::tuple<Address, int, int64_t, int64_t, int64_t>;
// (data, dtype, [N, K], [tile rows, tile columns], [row_count, row_tiles, col_count, col_tiles], bits,
// payload, scale)
using WeightArgs = std::tuple<Address, int, std::array<int64_t, 2>, std::array<int64_t, 2>,
                              std::array<Address, 4>, Address, Address, Address>;

Matrix matrix(const MatrixArgs& a) {
  return {at<const void>(std::get<0>(a)), static_cast<Dtype>(std::get<1>(a)), std::get<2>(a), std::get<3>(a),
          std::get<4>(a)};
}

Weight weight(const WeightArgs& a) {
  const auto& [data, dtype, shape, tile, lists, bits, payload, scale] = a;
  return {at<const void>(data),
          static_cast<Dtype>(dtype),
          shape[0],
          shape[1],
          tile[0],
          tile[1],
          at<const int32_t>(lists[0]),
          at<const int32_t>(lists[1]),
          at<const int32_t>(lists[2]),
          at<const int32_t>(lists[3]),
          at<const int32_t>(bits),
          at<const int8_t>(payload),
          at<const float>(scale)};
}

// (data, dtype, permutation, bias)
using OutputArgs = std::tuple<Address, int, Address, Address>;

Output output(const OutputArgs& a) {
  return {at<void>(std::get<0>(a)), static_cast<Dtype>(std::get<1>(a)), at<const int32_t>(std::get<2>(a)),
          at<const void>(std::get<3>(a))};
}

// (start, indices, values)
using RowsArgs = std::array<Address, 3>;

Rows rows(const RowsArgs& a) { return {at<int32_t>(a[0]), at<uint16_t>(a[1]), at<float>(a[2])}; }

// Row and column lists of the live tiles, keep tiles first; tiny, so one thread.
void fill_lists(const uint8_t* state, int64_t tiles_n, int64_t tiles_k, int32_t* row_count,
                int32_t* row_tiles, int32_t* col_count, int32_t* col_tiles) {
  std::fill_n(row_count, 2 * tiles_n, 0);
  std::fill_n(col_count, 2 * tiles_k, 0);
  for (int kind = 0; kind < 2; ++kind)
    for (int64_t i = 0; i < tiles_n; ++i)
      for (int64_t j = 0; j < tiles_k; ++j)
        if (state[i * tiles_k + j] == kind + 1) {
          int32_t* row = row_count + 2 * i;
          int32_t* col = col_count + 2 * j;
          row_tiles[i * tiles_k + (kind ? row[0] : 0) + row[kind]++] = static_cast<int32_t>(j);
          col_tiles[j * tiles_n + (kind ? col[0] : 0) + col[kind]++] = static_cast<int32_t>(i);
        }
}

// A packed weight with all that its kernel must know, so that a call hands over little but x and y.
class PackedProduct {
 public:
  PackedProduct(const std::string& kernel, const WeightArgs& w, const RowsArgs& r, Address packed,
                Address input_permutation, Address output_permutation)
      : kernel_(kernel == "tiles"  ? Kernel::tiles
                : kernel == "rows" ? Kernel::rows
                                   : Kernel::direct),
        weight_(weight(w)),
        rows_(rows(r)),
        packed_(at<const float>(packed)),
        input_permutation_(at<const int32_t>(input_permutation)),
        output_permutation_(at<const int32_t>(output_permutation)) {}

  void operator()(Address x, int64_t batch, int64_t stride, Address y, Address bias, int threads) const {
    const Matrix in{at<const void>(x), weight_.dtype, batch, weight_.in_features, stride};
    const Output out{at<void>(y), weight_.dtype, output_permutation_, at<const void>(bias)};
    if (kernel_ == Kernel::rows)
      RLNAS_DISPATCH(multiply_rows, in, weight_.out_features, rows_, input_permutation_, out, threads);
    else if (kernel_ == Kernel::tiles)
      RLNAS_DISPATCH(multiply_tiles, in, weight_, false, Kinds::both, packed_, input_permutation_, out,
                     threads);
    else
      RLNAS_DISPATCH(multiply_direct, in, weight_, input_permutation_, out, threads);
  }

 private:
  enum class Kernel { tiles, rows, direct } kernel_;
  Weight weight_;
  Rows rows_;
  const float* packed_;
  const int32_t* input_permutation_;
  const int32_t* output_permutation_;
};

}  // namespace
}  // namespace rlnas

void register_masked_matmul(py::module_& module) {
  using namespace rlnas;
  auto m =
      module.def_submodule("masked_matmul", "Masked matrix product; addresses of tensors that Python owns.");
  const py::call_guard<py::gil_scoped_release> unlocked;

  m.def(
      "pack_tiles",
      [](const WeightArgs& w, bool transposed, int kinds, Address packed, int threads) {
        RLNAS_DISPATCH(pack_tiles, weight(w), transposed, static_cast<Kinds>(kinds), at<float>(packed),
                       threads);
      },
      unlocked);
  m.def(
      "multiply_tiles",
      [](const MatrixArgs& x, const WeightArgs& w, bool transposed, int kinds, Address permutation,
         const OutputArgs& y, int threads) {
        RLNAS_DISPATCH(multiply_tiles, matrix(x), weight(w), transposed, static_cast<Kinds>(kinds), nullptr,
                       at<const int32_t>(permutation), output(y), threads);
      },
      unlocked);
  m.def(
      "sample_tiles",
      [](const MatrixArgs& grad_y, const MatrixArgs& x, const WeightArgs& w, Address output_perm,
         Address input_perm, Address grad_w, int threads) {
        RLNAS_DISPATCH(sample_tiles, matrix(grad_y), matrix(x), weight(w), at<const int32_t>(output_perm),
                       at<const int32_t>(input_perm), at<void>(grad_w), threads);
      },
      unlocked);
  m.def(
      "multiply_direct",
      [](const MatrixArgs& x, const WeightArgs& w, Address permutation, const OutputArgs& y, int threads) {
        RLNAS_DISPATCH(multiply_direct, matrix(x), weight(w), at<const int32_t>(permutation), output(y),
                       threads);
      },
      unlocked);
  m.def(
      "pack_rows",
      [](const WeightArgs& w, bool transposed, const RowsArgs& r, int threads) {
        RLNAS_DISPATCH(pack_rows, weight(w), transposed, rows(r), threads);
      },
      unlocked);
  m.def(
      "transpose_rows",
      [](const RowsArgs& r, std::array<int64_t, 2> shape, const RowsArgs& to, int threads) {
        RLNAS_DISPATCH(transpose_rows, rows(r), shape[0], shape[1], rows(to), threads);
      },
      unlocked);
  m.def(
      "multiply_rows",
      [](const MatrixArgs& x, int64_t out, const RowsArgs& r, Address permutation, const OutputArgs& y,
         int threads) {
        RLNAS_DISPATCH(multiply_rows, matrix(x), out, rows(r), at<const int32_t>(permutation), output(y),
                       threads);
      },
      unlocked);
  m.def(
      "sample_rows",
      [](const MatrixArgs& grad_y, const MatrixArgs& x, const WeightArgs& w, const RowsArgs& r,
         Address output_perm, Address input_perm, Address grad_w, int threads) {
        RLNAS_DISPATCH(sample_rows, matrix(grad_y), matrix(x), weight(w), rows(r),
                       at<const int32_t>(output_perm), at<const int32_t>(input_perm), at<void>(grad_w),
                       threads);
      },
      unlocked);
  m.def(
      "backward_rows",
      [](const MatrixArgs& grad_y, const MatrixArgs& x, const WeightArgs& w, const RowsArgs& r,
         const RowsArgs& transposed, Address output_perm, const OutputArgs& grad_x, Address grad_w,
         int threads) {
        const Output to = output(grad_x);
        RLNAS_DISPATCH(backward_rows, matrix(grad_y), matrix(x), weight(w), rows(r), rows(transposed),
                       at<const int32_t>(output_perm), to.permutation, to, at<void>(grad_w), threads);
      },
      unlocked);
  py::class_<PackedProduct>(m, "PackedProduct")
      .def(py::init<const std::string&, const WeightArgs&, const RowsArgs&, Address, Address, Address>())
      .def("__call__", &PackedProduct::operator(), unlocked);
  m.def(
      "mask_weight",
      [](const WeightArgs& w, Address to, int threads) {
        RLNAS_DISPATCH(mask_weight, weight(w), at<void>(to), threads);
      },
      unlocked);
  m.def(
      "pack_int8",
      [](const WeightArgs& w, Address packed, Address corrections, int threads) {
        RLNAS_DISPATCH(pack_int8, weight(w), at<int8_t>(packed), at<int32_t>(corrections), threads);
      },
      unlocked);
  m.def(
      "multiply_int8",
      [](const MatrixArgs& x, const WeightArgs& w, Address packed, Address corrections, Address permutation,
         const OutputArgs& y, bool accumulate, Address scratch, Address row_scales, int threads) {
        RLNAS_DISPATCH(multiply_int8, matrix(x), weight(w), at<const int8_t>(packed),
                       at<const int32_t>(corrections), at<const int32_t>(permutation), output(y), accumulate,
                       at<uint8_t>(scratch), at<float>(row_scales), threads);
      },
      unlocked);
  m.def(
      "pack_mask",
      [](Address dense, std::array<int64_t, 2> shape, std::array<int64_t, 2> tile, Address bits,
         Address state, int threads) {
        RLNAS_DISPATCH(pack_bits, at<const uint8_t>(dense), shape[0], shape[1], tile[0], tile[1],
                       at<int32_t>(bits), at<uint8_t>(state), threads);
      },
      unlocked);
  m.def(
      "update_lists",
      [](Address state, Address bits, std::array<int64_t, 2> shape, std::array<int64_t, 2> tile,
         std::array<Address, 4> lists, Address stats, int threads) {
        fill_lists(at<const uint8_t>(state), (shape[0] + tile[0] - 1) / tile[0],
                   (shape[1] + tile[1] - 1) / tile[1], at<int32_t>(lists[0]), at<int32_t>(lists[1]),
                   at<int32_t>(lists[2]), at<int32_t>(lists[3]));
        RLNAS_DISPATCH(count_bits, at<const uint8_t>(state), at<const int32_t>(bits), shape[0], shape[1],
                       tile[0], tile[1], at<int64_t>(stats), threads);
      },
      unlocked);
}
