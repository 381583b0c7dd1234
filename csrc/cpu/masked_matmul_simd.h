// Vectors of the instruction set in use, written once with GCC vector extensions.
// Included only by masked_matmul*.isa.cpp, inside whose namespace everything lands.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "cpu/masked_matmul.h"

namespace rlnas::RLNAS_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kPanel = 12;  // 12 x 2 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8, kPanel = 6;
#else
constexpr int kLanes = 4, kPanel = 4;
#endif

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedVector __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef int32_t IntVector __attribute__((vector_size(kLanes * 4)));
typedef int32_t UnalignedIntVector __attribute__((vector_size(kLanes * 4), aligned(4)));

static inline Vector load(const float* p) { return *reinterpret_cast<const UnalignedVector*>(p); }
static inline void store(float* p, Vector v) { *reinterpret_cast<UnalignedVector*>(p) = v; }
static inline Vector splat(float v) { return Vector{} + v; }

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// What all threads will read is written past the caches once it is larger than this: the copies of the last
// call's that other cores still hold make ordinary stores several times slower (kernels end with `drain`).
constexpr int64_t kSharedFloats = int64_t{1} << 16;

static inline void store_past(float* p, Vector v) {  // p on a border of a vector
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#else
  store(p, v);
#endif
}
static inline void drain() {
#ifdef __AVX2__
  _mm_sfence();
#endif
}
static inline void copy_past(float* to, const float* from, int64_t count) {
  int64_t k = 0;
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Vector) == 0)
    for (; k + kLanes <= count; k += kLanes) store_past(to + k, load(from + k));
  std::memcpy(to + k, from + k, static_cast<size_t>(count - k) * sizeof(float));
}

// `count` zeros past the caches (kernels end with `drain`).
template <class T>
static inline void zero_past(T* to, int64_t count) {
  char* at = reinterpret_cast<char*>(to);
  char* const end = reinterpret_cast<char*>(to + count);
  const auto border = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(at) % sizeof(Vector));
  const int64_t head = std::min<int64_t>(border, end - at);
  std::memset(at, 0, static_cast<size_t>(head));
  for (at += head; end - at >= static_cast<int64_t>(sizeof(Vector)); at += sizeof(Vector))
    store_past(reinterpret_cast<float*>(at), Vector{});
  std::memset(at, 0, static_cast<size_t>(end - at));
}

static inline float to_float(float v) { return v; }
static inline float to_float(Bf16 v) {
  const uint32_t word = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &word, 4);
  return f;
}
static inline float to_float(F16 v) {
#ifdef __F16C__
  return _cvtsh_ss(v.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  uint32_t exponent = (v.bits >> 10) & 31, mantissa = v.bits & 0x3ff, word;
  float f;
  if (exponent == 0) {  // subnormal: mantissa * 2^-24
    f = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -f : f;
  }
  word = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (mantissa << 13);
  std::memcpy(&f, &word, 4);
  return f;
#endif
}

template <class T>
static inline T from_float(float v);
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline Bf16 from_float<Bf16>(float v) {  // round to nearest even; NaN stays NaN
  uint32_t word;
  std::memcpy(&word, &v, 4);
  if ((word & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>((word >> 16) | 0x40)};
  return {static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16)};
}
template <>
inline F16 from_float<F16>(float v) {
#ifdef __F16C__
  return {static_cast<uint16_t>(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t word;
  std::memcpy(&word, &v, 4);
  const uint16_t sign = static_cast<uint16_t>((word >> 16) & 0x8000);
  word &= 0x7fffffff;
  if (word > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (word >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (word < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded integer in the low bits
    float magnitude;
    std::memcpy(&magnitude, &word, 4);
    magnitude += 0.5f;
    std::memcpy(&word, &magnitude, 4);
    return {static_cast<uint16_t>(sign | (word - 0x3f000000))};
  }
  return {static_cast<uint16_t>(sign | ((word - 0x38000000 + 0xfff + ((word >> 13) & 1)) >> 13))};
#endif
}

// Calls f with a null pointer of the element type.
template <class F>
static inline auto with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::bf16: return f(static_cast<Bf16*>(nullptr));
    case Dtype::f16: return f(static_cast<F16*>(nullptr));
    default: return f(static_cast<float*>(nullptr));
  }
}

// Transposes kLanes vectors in place by log2(kLanes) butterfly stages.
template <int Half>
static inline __attribute__((always_inline)) void transpose_stage(Vector* r) {
  IntVector low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i & Half ? kLanes + (i ^ Half) : i;
    high[i] = i & Half ? kLanes + i : (i ^ Half);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & Half)) {
      const Vector a = r[i], b = r[i ^ Half];
      r[i] = __builtin_shuffle(a, b, low);
      r[i ^ Half] = __builtin_shuffle(a, b, high);
    }
}
static inline __attribute__((always_inline)) void transpose(Vector* r) {
  if constexpr (kLanes >= 16) transpose_stage<kLanes >= 16 ? 8 : 1>(r);
  if constexpr (kLanes >= 8) transpose_stage<kLanes >= 8 ? 4 : 1>(r);
  transpose_stage<2>(r);
  transpose_stage<1>(r);
}

static inline float sum(Vector v) {
  float total = 0;
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  total = v[0];
  return total;
}

// Rows of a batch are shared out evenly over panels of at most kPanel.
struct Panels {
  int64_t rows, count, height, taller;
  Panels(int64_t rows_, int64_t limit)
      : rows(rows_),
        count((rows_ + limit - 1) / limit),
        height(count ? rows_ / count : 0),
        taller(count ? rows_ % count : 0) {}
  int64_t first(int64_t p) const { return p * height + std::min(p, taller); }
  int size(int64_t p) const { return static_cast<int>(height + (p < taller)); }
};

// n <= 32 bits of a row from column k on, the first in the lowest place.
static inline uint32_t bits_at(const int32_t* row, int64_t k, int n) {
  const int shift = static_cast<int>(k & 31);
  uint64_t word = static_cast<uint32_t>(row[k >> 5]);
  if (shift + n > 32) word |= static_cast<uint64_t>(static_cast<uint32_t>(row[(k >> 5) + 1])) << 32;
  word >>= shift;
  return static_cast<uint32_t>(n == 32 ? word : word & ((1u << n) - 1));
}

// The lanes of v whose bit is set; the others 0.
static inline Vector select(Vector v, uint32_t bits) {
#ifdef __AVX512F__
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v);
#else
  IntVector lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = 1 << i;
  const IntVector kept = ((IntVector{} + static_cast<int32_t>(bits)) & lane) != 0;
  return reinterpret_cast<Vector>(reinterpret_cast<IntVector>(v) & kept);
#endif
}

}  // namespace rlnas::RLNAS_ISA
