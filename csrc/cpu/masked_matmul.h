// Masked matrix product: what the checks (masked_matmul.cpp) hand to the kernels (masked_matmul*.isa.cpp).
// The layout of masks is documented in rlnas_fast/ops/masked_matmul/tile_mask.py.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace rlnas {

enum Slot { kRoom, kRun, kRight, kValues, kPicked };  // of scratch.h
enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

// Rows of x are `stride` elements apart, their elements adjacent.
struct Matrix {
  const void* data;
  Dtype dtype;
  int64_t rows, cols, stride;
};

// The weight and its mask.  Tile lists hold keep tiles first, then int8 tiles.
struct Weight {
  const void* data;  // [out_features, in_features], contiguous
  Dtype dtype;
  int64_t out_features, in_features;
  int64_t tile_rows, tile_cols;
  const int32_t* row_count;
  const int32_t* row_tiles;
  const int32_t* col_count;
  const int32_t* col_tiles;
  const int32_t* bits;    // null: live tiles are complete
  const int8_t* payload;  // null: no int8 tiles
  const float* scale;
};

// One product out = in * W^T seen from its lists: forward over tile rows, gradient to x over tile columns.
struct Direction {
  int64_t out, in, tile_out, tile_in;
  const int32_t* count;
  const int32_t* tiles;
  int64_t tiles_out, tiles_in;
};

inline Direction direction_of(const Weight& w, bool transposed) {
  const int64_t tiles_n = (w.out_features + w.tile_rows - 1) / w.tile_rows;
  const int64_t tiles_k = (w.in_features + w.tile_cols - 1) / w.tile_cols;
  if (transposed)
    return {w.in_features, w.out_features, w.tile_cols, w.tile_rows,
            w.col_count,   w.col_tiles,    tiles_k,     tiles_n};
  return {w.out_features, w.in_features, w.tile_rows, w.tile_cols,
          w.row_count,    w.row_tiles,   tiles_n,     tiles_k};
}

enum class Kinds : int { keep = 0, int8 = 1, both = 2 };

// Where a product goes: y[b, permutation[o]] = value + bias[permutation[o]].
struct Output {
  void* data;  // [rows, out], contiguous
  Dtype dtype;
  const int32_t* permutation;  // or null
  const void* bias;            // or null; of the output's dtype
};

// Packed weights are blocks of [tile_in][kBlock or kHalfBlock] floats, the same for every instruction set.
constexpr int64_t kBlock = 32, kHalfBlock = 16;
inline int64_t block_width(int64_t tile_out) { return tile_out <= kHalfBlock ? kHalfBlock : kBlock; }
inline int64_t blocks_in_tile(int64_t tile_out) {
  const int64_t width = block_width(tile_out);
  return (tile_out + width - 1) / width;
}

// The unstructured form: compressed rows with 16-bit indices.
struct Rows {
  int32_t* start;     // [out + 1]
  uint16_t* indices;  // [nonzeros]
  float* values;      // null: only the pattern is wanted
};

}  // namespace rlnas

namespace rlnas {
RLNAS_DECLARE(void pack_tiles(const Weight& weight, bool transposed, Kinds kinds, float* packed, int threads))
// `packed` null: tiles are packed on the way.
RLNAS_DECLARE(void multiply_tiles(const Matrix& x, const Weight& weight, bool transposed, Kinds kinds,
                                  const float* packed, const int32_t* input_permutation, const Output& y,
                                  int threads))
RLNAS_DECLARE(void sample_tiles(const Matrix& grad_y, const Matrix& x, const Weight& weight,
                                const int32_t* output_permutation, const int32_t* input_permutation,
                                void* grad_w, int threads))
RLNAS_DECLARE(void multiply_direct(const Matrix& x, const Weight& weight, const int32_t* input_permutation,
                                   const Output& y, int threads))
RLNAS_DECLARE(void pack_rows(const Weight& weight, bool transposed, const Rows& rows, int threads))
RLNAS_DECLARE(void transpose_rows(const Rows& rows, int64_t out, int64_t in, const Rows& to, int threads))
RLNAS_DECLARE(void multiply_rows(const Matrix& x, int64_t out, const Rows& rows,
                                 const int32_t* input_permutation, const Output& y, int threads))
RLNAS_DECLARE(void sample_rows(const Matrix& grad_y, const Matrix& x, const Weight& weight, const Rows& rows,
                               const int32_t* output_permutation, const int32_t* input_permutation,
                               void* grad_w, int threads))
// multiply_rows of grad_y and sample_rows, both permutations as in the latter.
RLNAS_DECLARE(void backward_rows(const Matrix& grad_y, const Matrix& x, const Weight& weight,
                                 const Rows& rows, const Rows& transposed, const int32_t* output_permutation,
                                 const int32_t* input_permutation, const Output& grad_x, void* grad_w,
                                 int threads))
// The weight with its mask applied and int8 tiles dequantised, dense.
RLNAS_DECLARE(void mask_weight(const Weight& weight, void* to, int threads))
RLNAS_DECLARE(void pack_int8(const Weight& weight, int8_t* packed, int32_t* corrections, int threads))
RLNAS_DECLARE(void multiply_int8(const Matrix& x, const Weight& weight, const int8_t* packed,
                                 const int32_t* corrections, const int32_t* input_permutation,
                                 const Output& y, bool accumulate, uint8_t* scratch, float* row_scales,
                                 int threads))
RLNAS_DECLARE(void pack_bits(const uint8_t* dense, int64_t rows, int64_t cols, int64_t tile_rows,
                             int64_t tile_cols, int32_t* bits, uint8_t* state, int threads))
RLNAS_DECLARE(void count_bits(const uint8_t* state, const int32_t* bits, int64_t rows, int64_t cols,
                              int64_t tile_rows, int64_t tile_cols, int64_t* stats, int threads))
}  // namespace rlnas
