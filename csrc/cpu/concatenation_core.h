// ReLU(a_i + b_j) is linear in a_i once it is known which keys are active.  Keys in falling and queries in
// rising order meet in one sweep: each key joins two running sums once, and no N x M or N x E table is kept.
// A tie is inactive, as ReLU's derivative at 0 is 0 in PyTorch.
// Included by *.isa.cpp only.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/rows.h"

namespace rlnas::RLNAS_ISA {
namespace {

struct Column {
  float* data;
  int64_t stride;
  float& at(int64_t i) const { return data[i * stride]; }
};

// The index in the high half, a key that rises with x in the low half; NaN, of either sign, is the greatest.
uint64_t sort_key(float x, int64_t index) {
  const uint32_t bits = to_bits(x), rising = x != x ? 0xffffffffu : bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(index) << 32 | rising;
}

// Indices of x in rising order: a radix sort, one byte a pass.
class Rising {
 public:
  void sort(Column x, int64_t count) {
    keys_.resize(count);
    spare_.resize(count);
    int64_t starts[4][256] = {};
    for (int64_t i = 0; i < count; i++) {
      keys_[i] = sort_key(x.at(i), i);
      for (int byte = 0; byte < 4; byte++) starts[byte][keys_[i] >> 8 * byte & 255]++;
    }
    for (int byte = 0; byte < 4; byte++) {
      int64_t total = 0;
      for (int64_t& start : starts[byte]) {
        const int64_t here = start;
        start = total;
        total += here;
      }
      for (const uint64_t key : keys_) spare_[starts[byte][key >> 8 * byte & 255]++] = key;
      keys_.swap(spare_);
    }
  }
  int64_t count() const { return static_cast<int64_t>(keys_.size()); }
  int64_t operator[](int64_t rank) const { return static_cast<int64_t>(keys_[rank] >> 32); }

 private:
  std::vector<uint64_t> keys_, spare_;
};

struct Sweep {
  double scale;
  Column query, key;
  Rows value;  // [keys][channels]
  Rows out{nullptr,
           0};  // [queries][channels] = scale * sum_j ReLU(query_i + key_j) value_j; null: not wanted
  Rows weight{nullptr, 0};  // with it slope_i = scale * weight_i . sum over active j of value_j
  Column slope{nullptr, 0};
};

// Channels [first, last); sums in float64, because query_i G + H may cancel.
void sweep(const Sweep& job, const Rising& queries, const Rising& keys, int64_t first, int64_t last) {
  const int64_t width = last - first;
  std::vector<double> sums(2 * width, 0.0);
  double* __restrict plain = sums.data(), * __restrict scaled = plain + width;
  int64_t active = 0;
  for (int64_t rank = 0; rank < queries.count(); rank++) {
    const int64_t i = queries[rank];
    const float a = job.query.at(i);
    for (; active < keys.count(); active++) {
      const int64_t j = keys[keys.count() - 1 - active];
      if (job.key.at(j) <= -a) break;
      const double weight = job.key.at(j);
      const float* __restrict row = job.value.at(j) + first;
      for (int64_t e = 0; e < width; e++) {
        plain[e] += row[e];
        scaled[e] += weight * row[e];
      }
    }
    if (job.out.data) {
      float* __restrict row = job.out.at(i) + first;
      const double slope_here = job.scale * a;
      for (int64_t e = 0; e < width; e++)
        row[e] = static_cast<float>(slope_here * plain[e] + job.scale * scaled[e]);
    }
    if (job.weight.data) {
      const float* __restrict row = job.weight.at(i) + first;
      double total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t e = 0; e < width; e++) total += plain[e] * row[e];
      job.slope.at(i) = static_cast<float>(job.scale * total);
    }
  }
}

}  // namespace
}  // namespace rlnas::RLNAS_ISA
