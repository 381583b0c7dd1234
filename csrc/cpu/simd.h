// One vector type for every instruction set, from the compiler's vector extensions: kernels are written once.
// Included by *.isa.cpp only.
#pragma once

#include <cstdint>
#include <utility>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace rlnas::RLNAS_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kRows = 12;  // 12 x 2 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kWidth = 8, kRows = 6;  // 6 x 2 of 16
#else
constexpr int kWidth = 4, kRows = 6;  // SSE2, NEON
#endif

#define RLNAS_INLINE static inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t VecInt __attribute__((vector_size(4 * kWidth)));
typedef float VecUnaligned __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

RLNAS_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
RLNAS_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }

// Packs, not loops over lanes: only an initialiser becomes one instruction.
typedef std::make_integer_sequence<int, kWidth> Lanes;
template <int... lane>
RLNAS_INLINE Vec broadcast(float x, std::integer_sequence<int, lane...>) {
  return Vec{((void)lane, x)...};
}
RLNAS_INLINE Vec broadcast(float x) { return broadcast(x, Lanes{}); }

// The first count lanes, all at most; the others are 0 and their memory is not touched.
#if defined(__AVX512F__)
RLNAS_INLINE Vec load_some(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
RLNAS_INLINE void store_some(float* p, Vec v, int64_t count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
}
#elif defined(__AVX2__)
RLNAS_INLINE __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
RLNAS_INLINE Vec load_some(const float* p, int64_t count) {
  return _mm256_maskload_ps(p, first_lanes(count));
}
RLNAS_INLINE void store_some(float* p, Vec v, int64_t count) {
  _mm256_maskstore_ps(p, first_lanes(count), v);
}
#else
RLNAS_INLINE Vec load_some(const float* p, int64_t count) {
  Vec v = {};
  for (int i = 0; i < count; i++) v[i] = p[i];
  return v;
}
RLNAS_INLINE void store_some(float* p, Vec v, int64_t count) {
  for (int i = 0; i < count; i++) p[i] = v[i];
}
#endif

// NaN in b is lost, NaN in a stays: running = maximum(new, running) keeps what came first.
#if defined(__AVX512F__)
RLNAS_INLINE Vec maximum(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)b, (__m512)a); }
#else
RLNAS_INLINE Vec maximum(Vec a, Vec b) { return a < b ? b : a; }
#endif

RLNAS_INLINE float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kWidth; i++) total += v[i];
  return total;
}

// exp(x) for x <= 88 to 2 ulp; below -87 exactly 0, or with AVX-512 as small as float32 goes; NaN stays NaN.
#if defined(__AVX512F__)
RLNAS_INLINE Vec exponential(Vec x) {
  const __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-104.0f), (__m512)x);  // the second one where NaN
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)((Vec)clamped * 1.44269504f), 8);
  Vec f = (Vec)clamped - n * 0.693145751953125f;
  f = f - n * 1.42860682e-6f;
  Vec p = broadcast(1.3888889e-3f);
  p = p * f + 8.3333333e-3f;
  p = p * f + 4.1666667e-2f;
  p = p * f + 1.6666667e-1f;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
}
#else
RLNAS_INLINE Vec exponential(Vec x) {
  // 1.5 * 2^23 + 127: adding it rounds to an integer and leaves the biased exponent in the low bits.
  const Vec magic = broadcast(12583039.0f);
  const Vec low = broadcast(-87.0f);
  Vec clamped = x < low ? low : x;
  Vec shifted = clamped * 1.44269504f + magic;
  Vec n = shifted - magic;
  Vec f = clamped - n * 0.693145751953125f;
  f = f - n * 1.42860682e-6f;
  Vec p = broadcast(1.3888889e-3f);
  p = p * f + 8.3333333e-3f;
  p = p * f + 4.1666667e-2f;
  p = p * f + 1.6666667e-1f;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  p *= (Vec)((VecInt)shifted << 23);
  return x < low ? Vec{} : p;
}
#endif

#if defined(__GNUC__) && !defined(__clang__)
template <int kStep, int... lane>
RLNAS_INLINE void swap_blocks(Vec& a, Vec& b, std::integer_sequence<int, lane...>) {
  const Vec first = __builtin_shuffle(a, b, VecInt{(lane & kStep ? kWidth + lane - kStep : lane)...});
  b = __builtin_shuffle(a, b, VecInt{(lane & kStep ? kWidth + lane : lane + kStep)...});
  a = first;
}
template <int kStep>
RLNAS_INLINE void transpose_from(Vec* rows) {
  if constexpr (kStep < kWidth) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; i++)
      if (!(i & kStep)) swap_blocks<kStep>(rows[i], rows[i + kStep], Lanes{});
    transpose_from<2 * kStep>(rows);
  }
}
RLNAS_INLINE void transpose(Vec rows[kWidth]) { transpose_from<1>(rows); }
#else
RLNAS_INLINE void transpose(Vec rows[kWidth]) {
  for (int i = 0; i < kWidth; i++)
    for (int j = 0; j < i; j++) {
      float x = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = x;
    }
}
#endif

// to[c][r] = from[r][c], in blocks of kWidth x kWidth.  The last block of a row or column of blocks overlaps
// the one before it, so that all are whole; only what is smaller than a block is taken by parts of vectors.
static inline void transpose(const float* from, int64_t ld_from, int64_t rows, int64_t columns, float* to,
                             int64_t ld_to) {
  const int64_t height = rows < kWidth ? rows : kWidth, width = columns < kWidth ? columns : kWidth;
  for (int64_t r = 0; r < rows; r += kWidth) {
    const int64_t row = r < rows - height ? r : rows - height;
    for (int64_t c = 0; c < columns; c += kWidth) {
      const int64_t column = c < columns - width ? c : columns - width;
      const float* source = from + row * ld_from + column;
      float* target = to + column * ld_to + row;
      Vec block[kWidth];
      if (height == kWidth && width == kWidth) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; i++) block[i] = load(source + i * ld_from);
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; i++) store(target + i * ld_to, block[i]);
      } else {
        for (int i = 0; i < kWidth; i++)
          block[i] = i < height ? load_some(source + i * ld_from, width) : Vec{};
        transpose(block);
        for (int i = 0; i < width; i++) store_some(target + i * ld_to, block[i], height);
      }
    }
  }
}

}  // namespace rlnas::RLNAS_ISA
