// What the CUDA kernels of masked_matmul take: raw pointers and sizes, in the words of tile_mask.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace rlnas {

enum class Element { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct MaskSizes {
  int rows, columns;            // N, K
  int tile_rows, tile_columns;  // R, C
  int row_tiles, column_tiles;  // TN, TK
  int words;                    // W
};

struct MaskPointers {
  uint8_t* state;
  uint32_t* bits;  // or null
  int32_t *row_count, *row_list, *column_count, *column_list;
  int64_t* stats;
  const int8_t* payload;  // or null
  const float* scale;
  const int32_t *input_permutation, *output_permutation;  // or null
};

struct ProductPointers {
  const void *x, *weight, *bias;  // bias may be null
  void* y;
};

// Counts, lists and stats from state and bits; with a bool [N, K] `dense`, first bits and state from that.
void update_mask(const uint8_t* dense, const MaskPointers& mask, const MaskSizes& sizes, cudaStream_t stream);

// y for 1 to 8 rows of x.  K, C and x_stride fill 16 bytes, pointers are aligned to 16, R is a multiple of 4.
void few_rows(const ProductPointers& pointers, const MaskPointers& mask, const MaskSizes& sizes, int batch,
              int64_t x_stride, Element element, cudaStream_t stream);

// Blocks that share what they read; {0, 0} chooses.  At most 8 blocks.
struct Cluster {
  int along_batch, along_rows;
};

// y on sm_90a for float16 and bfloat16, or `transposed` the gradient to x, for which x is the gradient to y.
// K is a multiple of 64, no int8 tiles, no permutation of what is read, pointers and rows of x aligned to 16
// bytes.  C divides 32 or is a multiple of it and K is at most 65536, or R and C are multiples of 64;
// transposed that, and no bits.
void hopper_tiles(const ProductPointers& pointers, const MaskPointers& mask, const MaskSizes& sizes,
                  int batch, int64_t x_stride, Element element, bool transposed, Cluster cluster,
                  cudaStream_t stream);

}  // namespace rlnas
