// Tensors of any dtype and strides as float32 rows [position][channel], in place where they are that already.
// Included by *.isa.cpp only.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/gemm.h"
#include "cpu/nonlocal_attention.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace rlnas::RLNAS_ISA {

struct Rows {
  float* data;
  int64_t ld;
  float* at(int64_t position) const { return data + position * ld; }
};

RLNAS_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
RLNAS_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

struct Float32 {
  typedef float Stored;
  static float read(float x) { return x; }
  static float write(float x) { return x; }
};
struct BFloat16 {
  typedef uint16_t Stored;
  static float read(uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); }
  static uint16_t write(float x) {  // to nearest, ties to even
    uint32_t bits = to_bits(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
  }
};
struct Float16 {
  typedef uint16_t Stored;
  static float read(uint16_t x) {
    uint32_t magnitude = x & 0x7fff, sign = static_cast<uint32_t>(x & 0x8000) << 16;
    // Moves exponent and mantissa into place and mends the exponent's bias by a product, also for subnormals.
    float value = from_bits(magnitude << 13) * from_bits(0x77800000);  // 2^112
    return from_bits(sign | (magnitude >= 0x7c00 ? 0x7f800000 | magnitude << 13 : to_bits(value)));
  }
  static uint16_t write(float x) {  // to nearest, ties to even
    uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
    if (magnitude < 0x38800000)  // subnormal: adding 0.5 lets the hardware round at 2^-24
      return static_cast<uint16_t>(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000));
    return static_cast<uint16_t>(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
  }
};

template <class F>
RLNAS_INLINE void with_dtype(DType dtype, F f) {
  if (dtype == DType::float32) f(Float32{});
  if (dtype == DType::bfloat16) f(BFloat16{});
  if (dtype == DType::float16) f(Float16{});
}

// One image of a View: positions are the flattened space.
class Image {
 public:
  Image(const View& view, int64_t batch, int64_t channels, const int64_t space[3])
      : view_(view), channels_(channels), space_(space), offset_(batch * view.batch) {
    step_ = space[2] > 1 ? view.space[2] : space[1] > 1 ? view.space[1] : view.space[0];
    const bool rows_follow = space[2] == 1 || space[1] == 1 || view.space[1] == space[2] * step_;
    const int64_t plane = space[1] * space[2];
    uniform_ = rows_follow && (plane == 1 || space[0] == 1 || view.space[0] == plane * step_);
  }

  bool in_place() const { return view_.dtype == DType::float32 && rows_follow(); }

  Rows in_place_rows(int64_t first) const {
    return {static_cast<float*>(view_.data) + offset_ + first * step_, step_};
  }

  // Whether a channel's positions lie side by side.
  bool channels_first() const { return uniform_ && step_ == 1 && channels_ > 1; }

  // Whether rows lie in memory as they are, in whatever dtype.
  bool rows_follow() const { return uniform_ && (view_.channel == 1 || channels_ == 1); }
  template <class Stored>
  Stored* row(int64_t position) const {
    return static_cast<Stored*>(view_.data) + offset_ + position * step_;
  }
  int64_t step() const { return step_; }
  int64_t channel_step() const { return view_.channel; }

  // Rows [first, last): a view of the tensor itself, or a copy in `buffer`.
  Rows load(int64_t first, int64_t last, float* buffer) const {
    if (in_place()) return in_place_rows(first);
    const Rows rows{buffer, channels_};
    with_dtype(view_.dtype, [&](auto dtype) { copy_in<decltype(dtype)>(first, last, rows); });
    return rows;
  }

  // Where the rows lie, if they lie dense and in place.
  void ahead(int64_t count, Ahead& lines) const {
    if (in_place() && step_ == channels_) lines.add(in_place_rows(0).data, count * channels_);
  }

  // Where rows [first, last) are to be written before `finish`.
  Rows target(int64_t first, float* buffer) const {
    return in_place() ? in_place_rows(first) : Rows{buffer, channels_};
  }

  void finish(int64_t first, int64_t last, Rows rows) const {
    if (in_place()) return;
    with_dtype(view_.dtype, [&](auto dtype) { copy_out<decltype(dtype)>(first, last, rows); });
  }

 private:
  static constexpr int64_t kLine = 64;  // positions whose rows stay in the first-level cache

  template <class D>
  typename D::Stored* place(int64_t position) const {
    if (uniform_) return row<typename D::Stored>(position);  // without the divisions below
    int64_t w = position % space_[2], h = position / space_[2] % space_[1],
            t = position / space_[2] / space_[1];
    return static_cast<typename D::Stored*>(view_.data) + offset_ + w * view_.space[2] + h * view_.space[1] +
           t * view_.space[0];
  }

  // Calls task(elements, channels, count, n, c) for parts of the lines of an image with channels first: some
  // channels from c on, at some positions from the n-th of [first, last) on.  The last of each overlap those
  // before them rather than be smaller.  Fetches the next part's lines, which are too many for the CPU to
  // foresee.
  template <class D, class Task>
  void over_lines(int64_t first, int64_t last, Task task) const {
    const int64_t all = last - first, count = std::min(kLine, all), step = view_.channel;
    const int64_t channels = std::min<int64_t>(kWidth, channels_);
    for (int64_t i = 0; i < all; i += kLine)
      for (int64_t j = 0; j < channels_; j += kWidth) {
        const int64_t n = std::min(i, all - count), c = std::min(j, channels_ - channels);
        auto* elements = row<typename D::Stored>(first + n);
        for (int64_t next = c + channels; next < std::min(c + 2 * channels, channels_); next++)
          for (int64_t k = 0; k < count; k += 64 / static_cast<int64_t>(sizeof *elements))
            __builtin_prefetch(elements + next * step + k);
        task(elements + c * step, channels, count, n, c);
      }
  }

  template <class D>
  void copy_in(int64_t first, int64_t last, Rows rows) const {
    if (channels_first()) {
      over_lines<D>(first, last, [&](auto* from, int64_t channels, int64_t count, int64_t n, int64_t c) {
        float *to = rows.at(n) + c, converted[kWidth * kLine];
        if constexpr (std::is_same_v<D, Float32>)
          transpose(from, view_.channel, channels, count, to, rows.ld);
        else {
          for (int64_t i = 0; i < channels; i++)
            for (int64_t j = 0; j < count; j++)
              converted[i * kLine + j] = D::read(from[i * view_.channel + j]);
          transpose(converted, kLine, channels, count, to, rows.ld);
        }
      });
      return;
    }
    for (int64_t n = first; n < last; n++) {
      const auto* from = place<D>(n);
      float* to = rows.at(n - first);
      if (view_.channel == 1)
        for (int64_t c = 0; c < channels_; c++) to[c] = D::read(from[c]);
      else
        for (int64_t c = 0; c < channels_; c++) to[c] = D::read(from[c * view_.channel]);
    }
  }

  template <class D>
  void copy_out(int64_t first, int64_t last, Rows rows) const {
    if (channels_first()) {
      over_lines<D>(first, last, [&](auto* to, int64_t channels, int64_t count, int64_t n, int64_t c) {
        float *from = rows.at(n) + c, converted[kWidth * kLine];
        if constexpr (std::is_same_v<D, Float32>)
          transpose(from, rows.ld, count, channels, to, view_.channel);
        else {
          transpose(from, rows.ld, count, channels, converted, kLine);
          for (int64_t i = 0; i < channels; i++)
            for (int64_t j = 0; j < count; j++)
              to[i * view_.channel + j] = D::write(converted[i * kLine + j]);
        }
      });
      return;
    }
    for (int64_t n = first; n < last; n++) {
      auto* to = place<D>(n);
      const float* from = rows.at(n - first);
      if (view_.channel == 1)
        for (int64_t c = 0; c < channels_; c++) to[c] = D::write(from[c]);
      else
        for (int64_t c = 0; c < channels_; c++) to[c * view_.channel] = D::write(from[c]);
    }
  }

  View view_;
  int64_t channels_;
  const int64_t* space_;
  int64_t offset_, step_;
  bool uniform_;
};

}  // namespace rlnas::RLNAS_ISA
