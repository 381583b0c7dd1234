// Small matrix products on one thread, C = init + A B, for operands that stay in cache.
// Included by *.isa.cpp only.
#pragma once

#include <algorithm>

#include "cpu/simd.h"

namespace rlnas::RLNAS_ISA {

// A left operand.  Row-major: element (m, k) at data[m * ld + k].  Depth-major: at data[k * ld + m].
enum class Order { row_major, depth_major };
struct Left {
  const float* data;
  int64_t ld;
};

constexpr int kPanel = 2 * kWidth;  // columns of C that one pass computes

// A right operand [depth][columns]: panels of kPanel columns, `stride` floats apart.
struct Right {
  const float* data;
  int64_t ld;
  int64_t stride = kPanel;
};

// Where C goes and what it starts from: null is 0; ld 0 repeats one row (a bias); data itself accumulates.
struct Out {
  float* data;
  int64_t ld;
  const float* init = nullptr;
  int64_t init_ld = 0;
  const float* row_scale = nullptr;  // multiplies each row of the result
};

// Memory that will be needed soon, fetched a few lines between two tiles of products, so that nothing waits.
class Ahead {
 public:
  void add(const float* from, int64_t floats) {
    if (count_ < kSpans) spans_[count_++] = {reinterpret_cast<const char*>(from), floats * 4};
  }
  void step() {
    for (int lines = kLines; lines > 0 && at_ < count_;) {
      Span& span = spans_[at_];
      for (; lines > 0 && span.left > 0; lines--, span.from += 64, span.left -= 64)
        __builtin_prefetch(span.from, 1, 2);
      if (span.left <= 0) at_++;
    }
  }

 private:
  struct Span {
    const char* from;
    int64_t left;
  };
  static constexpr int kSpans = 8, kLines = 16;
  Span spans_[kSpans];
  int count_ = 0, at_ = 0;
};

template <int R, int V, Order order, bool tail>
static __attribute__((noinline)) void tile(int64_t depth, Left a, const float* __restrict b, int64_t ldb,
                                           Out c, int64_t last) {
  Vec sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sums[r][v] = Vec{};
  constexpr int kGroups = (R + 2) / 3;  // rows in threes: base, base + ld, base + 2 ld need one register each
  const float* base[kGroups];
  for (int i = 0; i < kGroups; i++) base[i] = a.data + 3 * i * (order == Order::row_major ? a.ld : 1);
  const int64_t row = order == Order::row_major ? a.ld : 1, step = order == Order::row_major ? 1 : a.ld;
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; k++) {
    Vec right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++)
      right[v] = tail && v == V - 1 ? load_some(b + v * kWidth, last) : load(b + v * kWidth);
    b += ldb;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      Vec left = broadcast(base[r / 3][(r % 3) * row]);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sums[r][v] += left * right[v];
    }
#pragma GCC unroll 4
    for (int i = 0; i < kGroups; i++) base[i] += step;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      Vec result = sums[r][v];
      if (c.init) {
        const float* from = c.init + r * c.init_ld + v * kWidth;
        result += tail && v == V - 1 ? load_some(from, last) : load(from);
      }
      if (c.row_scale) result *= c.row_scale[r];
      float* to = c.data + r * c.ld + v * kWidth;
      if (tail && v == V - 1)
        store_some(to, result, last);
      else
        store(to, result);
    }
}

template <int V, Order order, bool tail, int R = kRows>
RLNAS_INLINE void tile_of(int64_t rows, int64_t depth, Left a, const float* b, int64_t ldb, Out c,
                          int64_t last) {
  if constexpr (R > 0) {
    if (rows == R)
      tile<R, V, order, tail>(depth, a, b, ldb, c, last);
    else
      tile_of<V, order, tail, R - 1>(rows, depth, a, b, ldb, c, last);
  }
}

// A sum longer than this is added up in parts: one long chain of roundings would lose a bit or two.
constexpr int64_t kChain = 256;

template <Order order>
static void gemm(int64_t rows, int64_t columns, int64_t depth, Left a, Right b, Out c,
                 Ahead* ahead = nullptr) {
  for (; depth > kChain; depth -= kChain) {
    const float* scale = c.row_scale;
    c.row_scale = nullptr;
    gemm<order>(rows, columns, kChain, a, b, c, ahead);
    a.data += kChain * (order == Order::row_major ? 1 : a.ld);
    b.data += kChain * b.ld;
    c = {c.data, c.ld, c.data, c.ld, scale};
  }
  for (int64_t n = 0; n < columns; n += kPanel) {
    const int64_t left = std::min<int64_t>(columns - n, kPanel), last = left % kWidth;
    const float* panel = b.data + n / kPanel * b.stride;
    int64_t tiles = (rows + kRows - 1) / kRows;
    for (int64_t m = 0; tiles > 0; tiles--) {
      const int64_t some = (rows - m + tiles - 1) / tiles;  // tiles of almost equal height
      const Left from{a.data + m * (order == Order::row_major ? a.ld : 1), a.ld};
      const Out to{c.data + m * c.ld + n, c.ld, c.init ? c.init + m * c.init_ld + n : nullptr, c.init_ld,
                   c.row_scale ? c.row_scale + m : nullptr};
      if (left > kWidth && last == 0)
        tile_of<2, order, false>(some, depth, from, panel, b.ld, to, last);
      else if (left > kWidth)
        tile_of<2, order, true>(some, depth, from, panel, b.ld, to, last);
      else if (last == 0)
        tile_of<1, order, false>(some, depth, from, panel, b.ld, to, last);
      else
        tile_of<1, order, true>(some, depth, from, panel, b.ld, to, last);
      if (ahead) ahead->step();
      m += some;
    }
  }
}

}  // namespace rlnas::RLNAS_ISA
