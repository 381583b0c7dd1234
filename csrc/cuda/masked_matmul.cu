// masked_matmul: mask to bits and lists, and products of a few rows, which memory bounds.
// Layout and names: rlnas_fast/ops/masked_matmul/tile_mask.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/masked_matmul.h"

namespace rlnas {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kChunkTiles = 1024;

void check(cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("masked_matmul: ") + cudaGetErrorString(status));
}

// Eight bytes of 0 or 1 to eight bits, the first byte lowest.
__device__ uint32_t gather_bits(uint32_t low, uint32_t high) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  return static_cast<uint32_t>(bytes * 0x0102040810204080ull >> 56);
}

__device__ uint32_t pack_word(uint4 low, uint4 high) {
  return gather_bits(low.x, low.y) | gather_bits(low.z, low.w) << 8 | gather_bits(high.x, high.y) << 16 |
         gather_bits(high.z, high.w) << 24;
}

// Bits [first, last) of a word, 0 <= first < last <= 32.
__device__ uint32_t bit_range(int first, int last) { return (~0u >> (32 - (last - first))) << first; }

enum class Source { kDense, kDenseUnaligned, kBits, kNothing };

// Kept weights of a word of the mask: from 32 bools, from what was packed before, or all.
template <Source kSource>
__device__ uint32_t read_word(const uint8_t* dense, const MaskPointers& mask, const MaskSizes& sizes, int row,
                              int word) {
  const int column = word * 32;
  const int count = min(32, sizes.columns - column);
  if constexpr (kSource == Source::kDense) {
    const auto* source =
        reinterpret_cast<const uint4*>(dense + row * static_cast<int64_t>(sizes.columns) + column);
    return pack_word(__ldcs(source), __ldcs(source + 1));
  } else if constexpr (kSource == Source::kDenseUnaligned) {
    const uint8_t* source = dense + row * static_cast<int64_t>(sizes.columns) + column;
    uint32_t value = 0;
    for (int bit = 0; bit < count; ++bit) value |= (source[bit] != 0u) << bit;
    return value;
  } else if constexpr (kSource == Source::kBits) {
    return mask.bits[row * static_cast<int64_t>(sizes.words) + word];
  } else {
    return bit_range(0, count);
  }
}

// A block owns one tile row and `chunk_words` words of it, a whole number of tiles: it packs a dense mask and
// derives the states from it, or reads bits that are there; and counts.
template <Source kSource>
__global__ void __launch_bounds__(kThreads)
    scan_kernel(const uint8_t* __restrict__ dense, MaskPointers mask, MaskSizes sizes, int chunk_words) {
  constexpr bool kPack = kSource == Source::kDense || kSource == Source::kDenseUnaligned;
  __shared__ uint32_t kept[kChunkTiles];
  __shared__ uint32_t totals[4];
  const int row_tile = blockIdx.y;
  const int first_word = blockIdx.x * chunk_words;
  const int chunk_tiles = chunk_words * 32 / sizes.tile_columns;
  const int words = min(chunk_words, sizes.words - first_word);
  const int first_row = row_tile * sizes.tile_rows;
  const int rows = min(sizes.tile_rows, sizes.rows - first_row);
  for (int tile = threadIdx.x; tile < chunk_tiles; tile += kThreads) kept[tile] = 0;
  if (threadIdx.x < 4) totals[threadIdx.x] = 0;
  __syncthreads();

  constexpr int kFlight = 4;  // loads under way before the first is used
  for (int base = threadIdx.x; base < rows * words; base += kFlight * kThreads) {
    uint32_t values[kFlight];
#pragma unroll
    for (int item = 0; item < kFlight; ++item) {
      const int index = base + item * kThreads;
      values[item] = 0;
      if (index < rows * words) {
        values[item] =
            read_word<kSource>(dense, mask, sizes, first_row + index / words, first_word + index % words);
      }
    }
#pragma unroll
    for (int item = 0; item < kFlight; ++item) {
      const int index = base + item * kThreads;
      if (index >= rows * words) break;
      const uint32_t value = values[item];
      if (kPack && mask.bits) {
        mask.bits[(first_row + index / words) * static_cast<int64_t>(sizes.words) + first_word +
                  index % words] = value;
      }
      if (value == 0) continue;
      const int column = index % words * 32;
      for (int tile = column / sizes.tile_columns; tile * sizes.tile_columns < column + 32; ++tile) {
        const int first = max(tile * sizes.tile_columns - column, 0);
        const int last = min((tile + 1) * sizes.tile_columns - column, 32);
        const int count = __popc(value & bit_range(first, last));
        if (count) atomicAdd(&kept[tile], count);
      }
    }
  }
  __syncthreads();
  for (int tile = threadIdx.x; tile < chunk_tiles; tile += kThreads) {
    const int column_tile = blockIdx.x * chunk_tiles + tile;
    if (column_tile >= sizes.column_tiles) break;
    uint8_t& place = mask.state[row_tile * static_cast<int64_t>(sizes.column_tiles) + column_tile];
    int state = place;
    if (kPack) {
      state = kept[tile] ? max(state, 1) : 0;
      place = static_cast<uint8_t>(state);
    }
    if (state == 0) continue;
    const int area = rows * (min((column_tile + 1) * sizes.tile_columns, sizes.columns) -
                             column_tile * sizes.tile_columns);
    const int count = mask.bits ? static_cast<int>(kept[tile]) : area;
    atomicAdd(&totals[state == 1 ? 0 : 1], 1u);
    atomicAdd(&totals[2], static_cast<uint32_t>(count));
    if (count != area) atomicAdd(&totals[3], 1u);
  }
  __syncthreads();
  if (threadIdx.x < 4 && totals[threadIdx.x]) {
    atomicAdd(reinterpret_cast<unsigned long long*>(mask.stats) + threadIdx.x,
              static_cast<unsigned long long>(totals[threadIdx.x]));
  }
}

// The tiles of one row or column in order, keep tiles before int8 tiles; one warp.
__device__ void compact(const uint8_t* state, int64_t stride, int length, int32_t* count, int32_t* tiles) {
  const int lane = threadIdx.x % 32;
  const uint32_t before = (1u << lane) - 1;
  int totals[2] = {0, 0};
#pragma unroll
  for (int kind = 1; kind <= 2; ++kind) {
    if (kind == 2 && totals[1] == 0) break;
    int place = kind == 1 ? 0 : totals[0];
    totals[1] = 0;
#pragma unroll 4
    for (int base = 0; base < length; base += 32) {
      const int tile = base + lane;
      const int value = tile < length ? state[tile * stride] : 0;
      const uint32_t found = __ballot_sync(~0u, value == kind);
      if (value == kind) tiles[place + __popc(found & before)] = tile;
      place += __popc(found);
      totals[1] += __popc(__ballot_sync(~0u, value == 2));
    }
    if (kind == 1) totals[0] = place;
  }
  if (lane < 2) count[lane] = totals[lane];
}

// A warp a line of tiles: rows first, then columns.
__global__ void __launch_bounds__(kThreads) list_kernel(MaskPointers mask, MaskSizes sizes) {
  const int line = blockIdx.x * kWarps + threadIdx.x / 32, column = line - sizes.row_tiles;
  if (line < sizes.row_tiles) {
    const int64_t first = static_cast<int64_t>(line) * sizes.column_tiles;
    compact(mask.state + first, 1, sizes.column_tiles, mask.row_count + 2 * line, mask.row_list + first);
  } else if (column < sizes.column_tiles) {
    const int64_t first = static_cast<int64_t>(column) * sizes.row_tiles;
    compact(mask.state + column, sizes.column_tiles, sizes.row_tiles, mask.column_count + 2 * column,
            mask.column_list + first);
  }
}

template <typename T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  static __device__ float2 read(uint32_t value) {
    return {__uint_as_float(value << 16), __uint_as_float(value & 0xffff0000u)};
  }
};
template <>
struct Pair<__half> {
  static __device__ float2 read(uint32_t value) {
    return __half22float2(*reinterpret_cast<const __half2*>(&value));
  }
};

// Sixteen bytes of T as floats.
template <typename T>
__device__ void widen(uint4 value, float (&out)[16 / sizeof(T)]) {
  const uint32_t words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = Pair<T>::read(words[i]);
      out[2 * i] = pair.x;
      out[2 * i + 1] = pair.y;
    }
  }
}

// A team of `team` warps makes y for kRows rows of the weight and kBatch rows of x.
template <typename T, int kBatch, int kRows>
__global__ void __launch_bounds__(kThreads)
    few_rows_kernel(ProductPointers p, MaskPointers mask, MaskSizes sizes, int batch, int64_t x_stride,
                    int team) {
  constexpr int kVector = 16 / sizeof(T);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = (blockIdx.x * (kWarps / team) + warp / team) * kRows;
  float sums[kRows][kBatch] = {};
  if (first_row < sizes.rows) {
    const int row_tile = first_row / sizes.tile_rows;
    const int keep = mask.row_count[2 * row_tile], live = keep + mask.row_count[2 * row_tile + 1];
    const int32_t* tiles = mask.row_list + static_cast<int64_t>(row_tile) * sizes.column_tiles;
    const T* weight = static_cast<const T*>(p.weight);
    for (int64_t at = (warp % team * 32 + lane) * kVector;
         at < static_cast<int64_t>(live) * sizes.tile_columns; at += team * 32 * kVector) {
      const int slot = static_cast<int>(at / sizes.tile_columns);
      const int tile = tiles[slot];
      const int column =
          tile * sizes.tile_columns + static_cast<int>(at - static_cast<int64_t>(slot) * sizes.tile_columns);
      if (column >= sizes.columns) continue;
      float weights[kRows][kVector];
      uint4 raw[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t offset =
            min(first_row + r, sizes.rows - 1) * static_cast<int64_t>(sizes.columns) + column;
        if (slot < keep) {
          raw[r] = __ldcs(reinterpret_cast<const uint4*>(weight + offset));
        } else {
#pragma unroll
          for (int i = 0; i < kVector; i += 4) {
            reinterpret_cast<uint32_t*>(&raw[r])[i / 4] =
                *reinterpret_cast<const uint32_t*>(mask.payload + offset + i);
          }
        }
      }
      float values[kBatch][kVector];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const T* source = static_cast<const T*>(p.x) + min(b, batch - 1) * x_stride + column;
        widen<T>(__ldg(reinterpret_cast<const uint4*>(source)), values[b]);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (slot < keep) {
          widen<T>(raw[r], weights[r]);
        } else {
          const float scale = mask.scale[row_tile * static_cast<int64_t>(sizes.column_tiles) + tile];
          const auto* bytes = reinterpret_cast<const int8_t*>(&raw[r]);
#pragma unroll
          for (int i = 0; i < kVector; ++i) weights[r][i] = scale * static_cast<float>(bytes[i]);
        }
        uint32_t bits = ~0u;
        if (mask.bits) {
          const int64_t row = min(first_row + r, sizes.rows - 1);
          bits = mask.bits[row * sizes.words + column / 32] >> (column % 32);
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float kept = bits >> i & 1 ? weights[r][i] : 0.0f;
#pragma unroll
          for (int b = 0; b < kBatch; ++b) sums[r][b] = fmaf(kept, values[b][i], sums[r][b]);
        }
      }
    }
  }
  __shared__ float partial[kWarps][kRows * kBatch];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      float sum = sums[r][b];
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
      if (lane == 0) partial[warp][r * kBatch + b] = sum;
    }
  }
  __syncthreads();
  for (int item = threadIdx.x; item < kWarps / team * kRows * kBatch; item += kThreads) {
    const int group = item / (kRows * kBatch), r = item % (kRows * kBatch) / kBatch, b = item % kBatch;
    const int row = (blockIdx.x * (kWarps / team) + group) * kRows + r;
    if (row >= sizes.rows || b >= batch) continue;
    float sum = 0.0f;
    for (int member = 0; member < team; ++member) sum += partial[group * team + member][r * kBatch + b];
    const int feature = mask.output_permutation ? mask.output_permutation[row] : row;
    if (p.bias) sum += static_cast<float>(static_cast<const T*>(p.bias)[feature]);
    static_cast<T*>(p.y)[b * static_cast<int64_t>(sizes.rows) + feature] = static_cast<T>(sum);
  }
}

template <typename T, int kBatch, int kRows>
void launch_few_rows(const ProductPointers& p, const MaskPointers& mask, const MaskSizes& sizes, int batch,
                     int64_t x_stride, cudaStream_t stream) {
  const int groups = (sizes.rows + kRows - 1) / kRows;
  int team = 1;
  while (team < kWarps && groups * team < 2048) team *= 2;
  const int per_block = kWarps / team;
  few_rows_kernel<T, kBatch, kRows>
      <<<(groups + per_block - 1) / per_block, kThreads, 0, stream>>>(p, mask, sizes, batch, x_stride, team);
}

template <typename T>
void choose_few_rows(const ProductPointers& p, const MaskPointers& mask, const MaskSizes& sizes, int batch,
                     int64_t x_stride, cudaStream_t stream) {
  if (batch == 1) return launch_few_rows<T, 1, 2>(p, mask, sizes, batch, x_stride, stream);
  if (batch == 2) return launch_few_rows<T, 2, 2>(p, mask, sizes, batch, x_stride, stream);
  if (batch <= 4) return launch_few_rows<T, 4, 4>(p, mask, sizes, batch, x_stride, stream);
  return launch_few_rows<T, 8, 4>(p, mask, sizes, batch, x_stride, stream);
}

}  // namespace

void update_mask(const uint8_t* dense, const MaskPointers& mask, const MaskSizes& sizes,
                 cudaStream_t stream) {
  check(cudaMemsetAsync(mask.stats, 0, 4 * sizeof(int64_t), stream));
  if (sizes.row_tiles + sizes.column_tiles == 0) return;
  if (sizes.row_tiles > 0 && sizes.column_tiles > 0) {
    int common = 32;  // greatest power of two that divides both a word and a tile
    while (sizes.tile_columns % common) common /= 2;
    const int unit = sizes.tile_columns / common;  // words until words and tiles end together
    const int chunk_words = (32 + unit - 1) / unit * unit;
    const dim3 grid((sizes.words + chunk_words - 1) / chunk_words, sizes.row_tiles);
    const bool aligned = sizes.columns % 32 == 0 && reinterpret_cast<uintptr_t>(dense) % 16 == 0;
    const auto kernel = dense ? (aligned ? scan_kernel<Source::kDense> : scan_kernel<Source::kDenseUnaligned>)
                              : (mask.bits ? scan_kernel<Source::kBits> : scan_kernel<Source::kNothing>);
    kernel<<<grid, kThreads, 0, stream>>>(dense, mask, sizes, chunk_words);
    check(cudaGetLastError());
  }
  const int lines = sizes.row_tiles + sizes.column_tiles;
  list_kernel<<<(lines + kWarps - 1) / kWarps, kThreads, 0, stream>>>(mask, sizes);
  check(cudaGetLastError());
}

void few_rows(const ProductPointers& pointers, const MaskPointers& mask, const MaskSizes& sizes, int batch,
              int64_t x_stride, Element element, cudaStream_t stream) {
  switch (element) {
    case Element::kFloat32: choose_few_rows<float>(pointers, mask, sizes, batch, x_stride, stream); break;
    case Element::kBFloat16:
      choose_few_rows<__nv_bfloat16>(pointers, mask, sizes, batch, x_stride, stream);
      break;
    case Element::kFloat16: choose_few_rows<__half>(pointers, mask, sizes, batch, x_stride, stream); break;
  }
  check(cudaGetLastError());
}

}  // namespace rlnas
