// Small matrix products on one thread, C = init + A B, for operands that stay in cache.
// Included by *.isa.cpp only.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/scratch.h"
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

RLNAS_INLINE int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
        __builtin_prefetch(span.from, 0, 2);
      if (span.left <= 0) at_++;
    }
  }

 private:
  struct Span {
    const char* from;
    int64_t left;
  };
  static constexpr int kSpans = 8, kLines = kRows * kPanel / 12;  // more while a tile is larger
  Span spans_[kSpans];
  int count_ = 0, at_ = 0;
};

constexpr int kLastSteps = kWidth == 16 ? 3 : 1;  // whose right operands fit the registers beside the sums
constexpr int kUnrolled = kWidth == 16 ? 1 : 2;   // steps between two jumps

template <class T>
RLNAS_INLINE const T* bytes_on(const T* from, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(from) + bytes);
}

// Takes all steps of a tile of R rows and V vectors: for each, `add` adds to sums[r][v] an element of the
// left operand `a` times a vector that `load` reads from the right operand `b`; `done` writes row r, after
// those before it.
//
// The last steps are taken row by row and each row is written as soon as it is done: two dozen stores in a
// row would fill the store buffer and keep the products of the next tile waiting.
template <int R, int V, Order order, class Operand, class Load, class Add, class Done>
RLNAS_INLINE void take_steps(int64_t depth, Operand a, Operand b, Load load, Add add, Done done) {
  constexpr bool by_row = order == Order::row_major;
  constexpr int kGroups = by_row ? (R + 2) / 3 : 1;  // of rows: base, base + ld, base + 2 ld are addresses
  constexpr int64_t kSize = sizeof(*a.data);
  int64_t lda = a.ld * kSize, ldb = b.ld * kSize;  // in bytes, as addresses are counted
  decltype(a.data) base[kGroups];
  base[0] = a.data;
  for (int i = 1; i < kGroups; i++) base[i] = bytes_on(base[i - 1], 3 * lda);
  using Vector = decltype(load(b.data, 0));
  const auto load_all = [&](int64_t k, Vector* right) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) right[v] = load(bytes_on(b.data, k * ldb) + v * kWidth, v);
  };
  const auto add_all = [&](int r, int64_t k, const Vector* right) __attribute__((always_inline)) {
    const auto left =
        by_row ? bytes_on(base[by_row ? r / 3 : 0], r % 3 * lda)[k] : bytes_on(base[0], k * lda)[r];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) add(r, v, left, right[v]);
  };
  const auto steps = [&](auto few) __attribute__((always_inline)) {
    constexpr int kSteps = few();
    // Taken for new values, or the compiler would keep sums of them, for which there are no registers.
    asm("" : "+r"(lda), "+r"(ldb));
#pragma GCC unroll 4
    for (int k = 0; k < kSteps; k++) {
      Vector right[V];
      load_all(k, right);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) add_all(r, k, right);
    }
    b.data = bytes_on(b.data, kSteps * ldb);
#pragma GCC unroll 4
    for (int i = 0; i < kGroups; i++) base[i] = bytes_on(base[i], kSteps * (by_row ? kSize : lda));
  };
  const auto finish = [&](auto few) __attribute__((always_inline)) {
    constexpr int kSteps = few();
    Vector right[kSteps + 1][V];
#pragma GCC unroll 4
    for (int k = 0; k < kSteps; k++) load_all(k, right[k]);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
      for (int k = 0; k < kSteps; k++) add_all(r, k, right[k]);
      done(r);
    }
  };
  const bool enough = depth >= kLastSteps;
  int64_t count = enough ? depth - kLastSteps : depth;
  for (; count >= kUnrolled; count -= kUnrolled) steps(std::integral_constant<int, kUnrolled>{});
  for (; count > 0; count--) steps(std::integral_constant<int, 1>{});
  if (enough)
    finish(std::integral_constant<int, kLastSteps>{});
  else
    finish(std::integral_constant<int, 0>{});
}

// Rows this far apart lie in a page each and share few sets of the first-level cache, so that every tile
// would fetch those of an operand from the second again, and wait at its end for those that it adds to.
constexpr int64_t kFarApart = 256;

// Writes `tiles` tiles of R rows of C, one below the other, from row m and column n on; `a` begins at row m,
// and at `next` floats more for each tile.  A call for each tile would take as long as half a dozen steps.
template <int R, int V, Order order, bool tail>
static __attribute__((noinline)) void column(int64_t tiles, int64_t depth, Left a, int64_t next,
                                             const float* b, int64_t ldb, const Out& c, int64_t m, int64_t n,
                                             int64_t last, Ahead* ahead) {
  float* data = c.data + m * c.ld + n;
  const float *init = c.init ? c.init + m * c.init_ld + n : nullptr,
              *scale = c.row_scale ? c.row_scale + m : nullptr;
  const int64_t ld = c.ld, init_ld = c.init_ld;
  for (; tiles > 0; tiles--) {
    Vec sums[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sums[r][v] = Vec{};
    if (ld >= kFarApart) {
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) __builtin_prefetch(data + r * ld, 1);
    }
    take_steps<R, V, order>(
        depth, a, Left{b, ldb},
        [&](const float* at, int v)
            __attribute__((always_inline)) { return tail && v == V - 1 ? load_some(at, last) : load(at); },
        [&](int r, int v, float left, Vec right)
            __attribute__((always_inline)) { sums[r][v] += broadcast(left) * right; },
        [&](int r) __attribute__((always_inline)) {
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) {
            Vec sum = sums[r][v];
            const bool some = tail && v == V - 1;
            if (init) sum += some ? load_some(init + v * kWidth, last) : load(init + v * kWidth);
            if (scale) sum *= *scale;
            if (some)
              store_some(data + v * kWidth, sum, last);
            else
              store(data + v * kWidth, sum);
          }
          data += ld;
          if (init) init += init_ld;
          if (scale) scale++;
        });
    a.data += next;
    if (ahead) ahead->step();
  }
}

template <int V, Order order, bool tail, int R = kRows>
RLNAS_INLINE void column_of(int64_t rows, int64_t tiles, int64_t depth, Left a, int64_t next, const float* b,
                            int64_t ldb, const Out& c, int64_t m, int64_t n, int64_t last, Ahead* ahead) {
  if constexpr (R > 0) {
    if (rows == R)
      column<R, V, order, tail>(tiles, depth, a, next, b, ldb, c, m, n, last, ahead);
    else
      column_of<V, order, tail, R - 1>(rows, tiles, depth, a, next, b, ldb, c, m, n, last, ahead);
  }
}

// Calls take(m, height, tiles) for the tiles of almost equal height that `rows` are taken in: those of one
// height lie below one another from row m on.
template <class Tiles>
RLNAS_INLINE void each_height(int64_t rows, const Tiles& take) {
  for (int64_t m = 0, tiles = ceil_divide(rows, kRows); tiles > 0;) {
    const int64_t height = ceil_divide(rows - m, tiles);
    const int64_t same = rows - m - tiles * (height - 1);  // the others have one row less
    take(m, height, same);
    m += same * height;
    tiles -= same;
  }
}

// A sum longer than this is added up in parts: one long chain of roundings would lose a bit or two.
constexpr int64_t kChain = 256;

enum CopySlot { kTileByTile = -2, kSideBySide = -1 };  // of scratch memory

// A panel [depth][columns] with its rows side by side.
static inline const float* side_by_side(const float* from, int64_t ld, int64_t depth, int64_t columns) {
  float* panel = scratch<kSideBySide>(kChain * kPanel);
  for (int64_t k = 0; k < depth; k++)
    for (int64_t n = 0; n < columns; n += kWidth) {
      const int64_t some = columns - n;
      const float* vector = from + k * ld + n;
      store(panel + k * kPanel + n, some < kWidth ? load_some(vector, some) : load(vector));
    }
  return panel;
}

// A depth-major left operand tile by tile, [depth][rows of the tile].
static inline const float* tile_by_tile(Left from, int64_t rows, int64_t depth) {
  float* const copy = scratch<kTileByTile>(rows * depth);
  float* to = copy;
  each_height(rows, [&](int64_t m, int64_t some, int64_t tiles) {
    for (; tiles > 0; tiles--, m += some)
      for (int64_t k = 0; k < depth; k++, to += some) {
        const float* row = from.data + k * from.ld + m;
        if (some == kRows)
          std::memcpy(to, row, sizeof(float) * kRows);  // of a size that is known, two instructions
        else
          std::copy(row, row + some, to);
      }
  });
  return copy;
}

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
  // Copies are worth it for four tiles.
  const bool copied = b.ld >= kFarApart && rows >= 4 * kRows;
  const bool tiled = order == Order::depth_major && a.ld >= kFarApart && columns >= 4 * kPanel;
  const int64_t ld = copied ? kPanel : b.ld;
  if (tiled) a.data = tile_by_tile(a, rows, depth);
  for (int64_t n = 0; n < columns; n += kPanel) {
    const int64_t left = std::min<int64_t>(columns - n, kPanel), last = left % kWidth;
    const float* panel = b.data + n / kPanel * b.stride;
    if (copied) panel = side_by_side(panel, b.ld, depth, left);
    each_height(rows, [&](int64_t m, int64_t some, int64_t same) {
      const Left from = tiled                       ? Left{a.data + m * depth, some}
                        : order == Order::row_major ? Left{a.data + m * a.ld, a.ld}
                                                    : Left{a.data + m, a.ld};
      const int64_t next = some * (tiled ? depth : order == Order::row_major ? a.ld : 1);
      if (left > kWidth && last == 0)
        column_of<2, order, false>(some, same, depth, from, next, panel, ld, c, m, n, last, ahead);
      else if (left > kWidth)
        column_of<2, order, true>(some, same, depth, from, next, panel, ld, c, m, n, last, ahead);
      else if (last == 0)
        column_of<1, order, false>(some, same, depth, from, next, panel, ld, c, m, n, last, ahead);
      else
        column_of<1, order, true>(some, same, depth, from, next, panel, ld, c, m, n, last, ahead);
    });
  }
}

}  // namespace rlnas::RLNAS_ISA
