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

// Indices of x in rising order, the first of equals first.
class Rising {
 public:
  void sort(Column x, int64_t count) {
    if (count <= kFew) return sort_few(x, count);
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
  static constexpr int64_t kFew = 128;

  template <int... lane>
  static VecInt lanes_up(std::integer_sequence<int, lane...>) {
    return VecInt{lane...};
  }

  // Each rank by counting what is less: no counters to clear, and kWidth ranks at a time.  Beyond kFew a
  // radix sort, one byte a pass, takes over.
  void sort_few(Column x, int64_t count) {
    typedef uint32_t VecKey __attribute__((vector_size(4 * kWidth)));
    VecKey keys[kFew / kWidth] = {};
    uint32_t* key = reinterpret_cast<uint32_t*>(keys);
    keys_.resize(count);
    for (int64_t i = 0; i < count; i++) key[i] = static_cast<uint32_t>(sort_key(x.at(i), i));
    for (int64_t i = 0; i < count; i += kWidth) {
      const VecKey here = keys[i / kWidth];
      VecInt less = {};
      const auto end = std::min(i + kWidth, count);
      for (int64_t j = 0; j < i; j++) less += (VecInt)(here >= key[j]);
      for (int64_t j = i; j < end; j++) {
        const VecInt after = lanes_up(Lanes{}) > static_cast<int32_t>(j - i);
        less += (VecInt)(here > key[j]) | ((VecInt)(here == key[j]) & after);
      }
      for (int64_t j = end; j < count; j++) less += (VecInt)(here > key[j]);
      for (int64_t lane = 0; lane < end - i; lane++)
        keys_[-less[lane]] = static_cast<uint64_t>(i + lane) << 32;
    }
  }

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

// Half a vector of float32 and as many float64.
typedef float Narrow __attribute__((vector_size(2 * kWidth)));
typedef double Wide __attribute__((vector_size(4 * kWidth)));

RLNAS_INLINE void widen_some(const float* from, int64_t count, Wide to[2]) {
  const Vec both = load_some(from, count);
  Narrow halves[2];
  std::memcpy(halves, &both, sizeof(both));
  for (int h = 0; h < 2; h++) to[h] = __builtin_convertvector(halves[h], Wide);
}

RLNAS_INLINE void narrow_some(float* to, const Wide from[2], int64_t count) {
  const Narrow halves[2] = {__builtin_convertvector(from[0], Narrow),
                            __builtin_convertvector(from[1], Narrow)};
  Vec both;
  std::memcpy(&both, halves, sizeof(both));
  store_some(to, both, count);
}

// Channels [first, first + count) of at most V vectors, whose sums stay in registers.
template <int V>
void sweep_some(const Sweep& job, const Rising& queries, const Rising& keys, int64_t first, int64_t count,
                double* slopes) {
  Wide plain[V][2] = {}, scaled[V][2] = {};
  int64_t some[V], active = 0;
  for (int v = 0; v < V; v++) some[v] = std::min<int64_t>(kWidth, count - v * kWidth);
  const int64_t last = keys.count() - 1;
  for (int64_t rank = 0; rank < queries.count(); rank++) {
    const int64_t i = queries[rank];
    const float a = job.query.at(i);
    for (; active <= last; active++) {
      const int64_t j = keys[last - active];
      const float b = job.key.at(j);
      if (b <= -a) break;
      const double weight = b;
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        Wide row[2];
        widen_some(job.value.at(j) + first + v * kWidth, some[v], row);
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
          plain[v][h] += row[h];
          scaled[v][h] += weight * row[h];
        }
      }
    }
    if (job.out.data) {
      const double slope_here = job.scale * a;
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        const Wide row[2] = {slope_here * plain[v][0] + job.scale * scaled[v][0],
                             slope_here * plain[v][1] + job.scale * scaled[v][1]};
        narrow_some(job.out.at(i) + first + v * kWidth, row, some[v]);
      }
    }
    if (job.weight.data) {
      Wide total = {};
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        Wide row[2];
        widen_some(job.weight.at(i) + first + v * kWidth, some[v], row);
        total += plain[v][0] * row[0] + plain[v][1] * row[1];
      }
      double here = 0;
      for (int lane = 0; lane < kWidth / 2; lane++) here += total[lane];
      slopes[i] += here;
    }
  }
}

// Channels [first, last); sums in float64, because query_i G + H may cancel.
void sweep(const Sweep& job, const Rising& queries, const Rising& keys, int64_t first, int64_t last) {
  static thread_local std::vector<double> slopes;
  if (job.weight.data) slopes.assign(queries.count(), 0.0);
  for (int64_t e = first; e < last; e += 2 * kWidth) {
    const int64_t count = std::min<int64_t>(last - e, 2 * kWidth);
    if (count > kWidth)
      sweep_some<2>(job, queries, keys, e, count, slopes.data());
    else
      sweep_some<1>(job, queries, keys, e, count, slopes.data());
  }
  if (job.weight.data)
    for (int64_t i = 0; i < queries.count(); i++) job.slope.at(i) = static_cast<float>(job.scale * slopes[i]);
}

}  // namespace
}  // namespace rlnas::RLNAS_ISA
