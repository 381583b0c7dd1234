// A dense mask to bits and tile states, and what a mask holds.
#include "cpu/masked_matmul_simd.h"

namespace rlnas::RLNAS_ISA {
namespace {

// 32 bytes (bools) to 32 bits.
inline uint32_t pack_word(const uint8_t* dense, int n) {
  alignas(32) uint8_t padded[32] = {};
  if (n < 32) {
    std::memcpy(padded, dense, static_cast<size_t>(n));
    dense = padded;
  }
#if defined(__AVX2__)
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(dense));
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpgt_epi8(bytes, _mm256_setzero_si256())));
#else
  uint32_t word = 0;
  for (int i = 0; i < 32; ++i) word |= static_cast<uint32_t>(dense[i] != 0) << i;
  return word;
#endif
}

inline bool any_bit(const int32_t* row, int64_t k0, int64_t k1) {
  for (int64_t k = k0; k < k1; k += 32)
    if (bits_at(row, k, static_cast<int>(std::min<int64_t>(32, k1 - k)))) return true;
  return false;
}

}  // namespace

void pack_bits(const uint8_t* dense, int64_t rows, int64_t cols, int64_t tile_rows, int64_t tile_cols,
               int32_t* bits, uint8_t* state, int threads) {
  const int64_t words = (cols + 31) / 32;
  const int64_t tiles_n = (rows + tile_rows - 1) / tile_rows, tiles_k = (cols + tile_cols - 1) / tile_cols;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < tiles_n; ++i) {
    const int64_t n0 = i * tile_rows, n1 = std::min(rows, n0 + tile_rows);
    for (int64_t n = n0; n < n1; ++n)
      for (int64_t w = 0; w < words; ++w)
        bits[n * words + w] = static_cast<int32_t>(
            pack_word(dense + n * cols + w * 32, static_cast<int>(std::min<int64_t>(32, cols - w * 32))));
    for (int64_t j = 0; j < tiles_k; ++j) {
      const int64_t k0 = j * tile_cols, k1 = std::min(cols, k0 + tile_cols);
      bool kept = false;
      for (int64_t n = n0; n < n1 && !kept; ++n) kept = any_bit(bits + n * words, k0, k1);
      uint8_t& tile = state[i * tiles_k + j];
      tile = kept ? (tile ? tile : 1) : 0;
    }
  }
}

// stats: keep tiles, int8 tiles, kept weights, live tiles that are not complete.
void count_bits(const uint8_t* state, const int32_t* bits, int64_t rows, int64_t cols, int64_t tile_rows,
                int64_t tile_cols, int64_t* stats, int threads) {
  const int64_t words = (cols + 31) / 32;
  const int64_t tiles_n = (rows + tile_rows - 1) / tile_rows, tiles_k = (cols + tile_cols - 1) / tile_cols;
  int64_t keep = 0, int8 = 0, weights = 0, incomplete = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : keep, int8, weights, incomplete)
  for (int64_t i = 0; i < tiles_n; ++i)
    for (int64_t j = 0; j < tiles_k; ++j) {
      const uint8_t tile = state[i * tiles_k + j];
      if (!tile) continue;
      ++(tile == 1 ? keep : int8);
      const int64_t n0 = i * tile_rows, n1 = std::min(rows, n0 + tile_rows);
      const int64_t k0 = j * tile_cols, k1 = std::min(cols, k0 + tile_cols);
      int64_t kept = (n1 - n0) * (k1 - k0);
      if (bits) {
        kept = 0;
        if (tile_cols % 32 == 0) {  // whole words, since bits past the last column are 0
          for (int64_t n = n0; n < n1; ++n)
            for (int64_t w = k0 / 32; w < (k1 + 31) / 32; ++w)
              kept += __builtin_popcount(static_cast<uint32_t>(bits[n * words + w]));
        } else {
          for (int64_t n = n0; n < n1; ++n)
            for (int64_t k = k0; k < k1; k += 32)
              kept += __builtin_popcount(
                  bits_at(bits + n * words, k, static_cast<int>(std::min<int64_t>(32, k1 - k))));
        }
        incomplete += kept != (n1 - n0) * (k1 - k0);
      }
      weights += kept;
    }
  stats[0] = keep, stats[1] = int8, stats[2] = weights, stats[3] = incomplete;
}

// Without a payload int8 tiles are keep tiles.
template <class T>
static void masked_row(const Weight& w, const Direction& d, int64_t n, T* to) {
  const int64_t i = n / w.tile_rows, words = (w.in_features + 31) / 32, row = n * w.in_features;
  const T* const from = static_cast<const T*>(w.data) + row;
  std::memset(to, 0, static_cast<size_t>(w.in_features) * sizeof(T));
  for (int64_t t = 0; t < d.count[2 * i] + d.count[2 * i + 1]; ++t) {
    const int64_t j = d.tiles[i * d.tiles_in + t], k1 = std::min(w.in_features, (j + 1) * w.tile_cols);
    const bool int8 = w.payload && t >= d.count[2 * i];
    const float scale = int8 ? w.scale[i * d.tiles_in + j] : 1.0f;
    for (int64_t k = j * w.tile_cols; k < k1; k += 32) {
      const int steps = static_cast<int>(std::min<int64_t>(32, k1 - k));
      const uint32_t bits = w.bits ? bits_at(w.bits + n * words, k, steps) : 0xffffffffu;
      int c = 0;
      if constexpr (std::is_same_v<T, float>)
        for (; !int8 && c + kLanes <= steps; c += kLanes)
          store(to + k + c,
                select(load(from + k + c), bits >> c & static_cast<uint32_t>((1ull << kLanes) - 1)));
      for (; c < steps; ++c)
        if (bits >> c & 1)
          to[k + c] = int8 ? from_float<T>(scale * static_cast<float>(w.payload[row + k + c])) : from[k + c];
    }
  }
}

void mask_weight(const Weight& weight, void* to, int threads) {
  const Direction d = direction_of(weight, false);
  with_type(weight.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < d.out; ++n)
      masked_row(weight, d, n, static_cast<T*>(to) + n * weight.in_features);
  });
}

}  // namespace rlnas::RLNAS_ISA
