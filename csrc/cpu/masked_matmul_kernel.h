// The register-blocked product that all tile kernels share, and what surrounds it.
#pragma once

#include <array>
#include <utility>

#include "cpu/masked_matmul_simd.h"

namespace rlnas::RLNAS_ISA {

// One long chain of additions breaks the twice-the-error rule, so partial sums leave the registers this
// often.
constexpr int kFlush = 128;

// A list of tiles: tile t holds `depth` steps of the inner dimension from step tiles[t] * depth on.
struct Chain {
  const int32_t* tiles;
  int64_t count, depth, inner;
};

// sum[r][c] = sum over the chain of a[step][r] * w[step][c]; a is [inner][R], w is [count * depth][width].
template <int R, int V>
static void multiply_panel(const float* a, const float* w, int64_t width, const Chain& chain, float* sum) {
  // Few accumulators cannot hide the latency of an addition: several steps then go side by side.
  constexpr int kSteps = R * V >= 8 ? 1 : R * V >= 4 ? 2 : 4;
  Vector acc[kSteps][R][V];
  bool flushed = false;
  int run = 0;
  const auto clear = [&] {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v)
#pragma GCC unroll 4
        for (int s = 0; s < kSteps; ++s) acc[s][r][v] = Vector{};
  };
  const auto flush = [&] {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        float* place = sum + r * width + v * kLanes;
        Vector total = acc[0][r][v];
#pragma GCC unroll 4
        for (int s = 1; s < kSteps; ++s) total += acc[s][r][v];
        store(place, flushed ? load(place) + total : total);
      }
    flushed = true;
    run = 0;
  };
  clear();
  for (int64_t t = 0; t < chain.count; ++t) {
    const int64_t first = chain.tiles[t] * chain.depth;
    const float* at = a + first * R;
    const float* wt = w + t * chain.depth * width;
    for (int64_t left = std::min(chain.depth, chain.inner - first); left > 0;) {
      const int64_t steps = std::min<int64_t>(left, kFlush - run);
      const auto step = [&](Vector(*into)[V]) __attribute__((always_inline)) {
        Vector weights[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) weights[v] = load(wt + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const Vector x = splat(at[r]);
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) into[r][v] += x * weights[v];
        }
        at += R;
        wt += width;
      };
      int64_t k = 0;
#pragma GCC unroll 4
      for (; k + kSteps <= steps; k += kSteps)
#pragma GCC unroll 4
        for (int s = 0; s < kSteps; ++s) step(acc[s]);
      for (; k < steps; ++k) step(acc[0]);
      run += static_cast<int>(steps);
      left -= steps;
      if (run == kFlush) {
        flush();
        clear();
      }
    }
  }
  if (run || !flushed) flush();
}

using PanelKernel = void (*)(const float*, const float*, int64_t, const Chain&, float*);

template <int V, int... R>
static constexpr std::array<PanelKernel, sizeof...(R)> panel_kernels(std::integer_sequence<int, R...>) {
  return {multiply_panel<R + 1, V>...};
}

// sum is [rows][width], width a multiple of kHalfBlock.
static inline void multiply_block(int rows, const float* a, const float* w, int64_t width, const Chain& chain,
                                  float* sum) {
  static constexpr auto two = panel_kernels<2>(std::make_integer_sequence<int, kPanel>{});
  static constexpr auto one = panel_kernels<1>(std::make_integer_sequence<int, kPanel>{});
  int64_t c = 0;
  for (; c + 2 * kLanes <= width; c += 2 * kLanes) two[rows - 1](a, w + c, width, chain, sum + c);
  for (; c < width; c += kLanes) one[rows - 1](a, w + c, width, chain, sum + c);
}

// Steps [k0, k1) of a panel of x as [step - k0][rows], in float: element (r, k) is x[first + r,
// permutation[k]].
template <class T>
static void pack_panel(const T* x, int64_t stride, int64_t first, int rows, int64_t k0, int64_t k1,
                       const int32_t* permutation, float* panel) {
  alignas(64) float stage[kLanes];
  float* const end = panel + (k1 - k0) * rows;
  for (int64_t k = k0; k < k1; k += kLanes) {
    const int steps = static_cast<int>(std::min<int64_t>(kLanes, k1 - k));
    Vector r[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      r[i] = Vector{};
      if (i >= rows) continue;
      const T* row = x + (first + i) * stride;
      if constexpr (std::is_same_v<T, float>)
        if (!permutation && steps == kLanes) {
          r[i] = load(row + k);
          continue;
        }
      for (int j = 0; j < steps; ++j) stage[j] = to_float(row[permutation ? permutation[k + j] : k + j]);
      for (int j = steps; j < kLanes; ++j) stage[j] = 0;
      r[i] = load(stage);
    }
    transpose(r);
    for (int j = 0; j < steps; ++j) {
      float* place = panel + (k - k0 + j) * rows;
      if (place + kLanes <= end)
        store(place, r[j]);  // the lanes past `rows` are overwritten by the next step
      else
        std::memcpy(place, &r[j], static_cast<size_t>(rows) * sizeof(float));
    }
  }
}

// y[first + r, o0 + c] of sums [rows][width], c < columns.
template <class T>
static void write_block(const float* sum, int64_t width, int64_t first, int rows, int64_t o0, int64_t columns,
                        const Output& y, int64_t out) {
  T* data = static_cast<T*>(y.data);
  const T* bias = static_cast<const T*>(y.bias);
  for (int r = 0; r < rows; ++r) {
    const float* s = sum + r * width;
    T* row = data + (first + r) * out;
    if (y.permutation) {
      for (int64_t c = 0; c < columns; ++c) {
        const int32_t o = y.permutation[o0 + c];
        row[o] = from_float<T>(bias ? s[c] + to_float(bias[o]) : s[c]);
      }
      continue;
    }
    int64_t c = 0;
    if constexpr (std::is_same_v<T, float>)
      for (; c + kLanes <= columns; c += kLanes)
        store(row + o0 + c, bias ? load(s + c) + load(bias + o0 + c) : load(s + c));
    for (; c < columns; ++c) row[o0 + c] = from_float<T>(bias ? s[c] + to_float(bias[o0 + c]) : s[c]);
  }
}

// Asks for lines that will be written once a product is there: each row is on a page of its own, so that the
// stores would wait.
template <class T>
static inline void expect_lines(const T* at, int64_t stride, int rows, int64_t columns) {
  for (int r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += 64 / sizeof(T)) __builtin_prefetch(at + r * stride + c, 1);
}

template <class T>
static inline void expect_block(int64_t first, int rows, int64_t o0, int64_t columns, const Output& y,
                                int64_t out) {
  if (!y.permutation) expect_lines(static_cast<const T*>(y.data) + first * out + o0, out, rows, columns);
}

// Columns [k0, k0 + n), n <= 32, of a weight's row in float, with mask and int8 applied; the rest of `to` is
// 0.
template <class T>
static inline void fetch_row(const Weight& w, int64_t row, int64_t k0, int n, bool int8, float scale,
                             float* to) {
  for (int j = n; j < 32; ++j) to[j] = 0;
  const int64_t at = row * w.in_features + k0;
  if (int8) {
    for (int j = 0; j < n; ++j) to[j] = scale * static_cast<float>(w.payload[at + j]);
  } else {
    const T* source = static_cast<const T*>(w.data) + at;
    for (int j = 0; j < n; ++j) to[j] = to_float(source[j]);
  }
  if (!w.bits) return;
  const uint32_t bits = bits_at(w.bits + row * ((w.in_features + 31) / 32), k0, n);
  for (int j = 0; j < 32; j += kLanes)
    store(to + j, select(load(to + j), (bits >> j) & ((1ull << kLanes) - 1)));
}

}  // namespace rlnas::RLNAS_ISA
