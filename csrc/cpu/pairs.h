// Products of bfloat16 pairs along the depth with vdpbf16ps, sums in float32, and rows in that form.
//
// A left operand is bfloat16 rows as they lie in memory, or pairs [depth / 2][row]; a right operand is pairs
// [depth / 2][column].  Included by *.isa.cpp only.
#pragma once

#include "cpu/nonlocal_block.h"

#ifdef __AVX512BF16__
namespace rlnas::RLNAS_ISA {
namespace {

typedef uint16_t Half;  // bfloat16
typedef uint32_t Pair __attribute__((aligned(2), may_alias));

struct HalfRows {
  Half* data;
  int64_t ld;
  Half* at(int64_t row) const { return data + row * ld; }
  HalfRows below(int64_t row) const { return {at(row), ld}; }
  HalfRows beside(int64_t column) const { return {data ? data + column : nullptr, ld}; }
};
struct LeftPairs {
  const Pair* data;
  int64_t ld;
};
struct RightPairs {
  const Pair* data;
  int64_t ld, stride;  // stride: from one panel of kPanel columns to the next
};
struct PairOut {
  float* sums;  // float32 result, added to what is there if `accumulate`; or null, then
  Half* half;   // bfloat16 result: bias + product, times row_scale or plus init
  int64_t ld;
  bool accumulate = false;
  const Half* init = nullptr;
  int64_t init_ld = 0;
  const float* bias = nullptr;
  const float* row_scale = nullptr;
};

constexpr __mmask16 kAll = 0xffff;
RLNAS_INLINE __mmask16 lanes_mask(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
RLNAS_INLINE Vec widened(__m256i half) { return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16); }
RLNAS_INLINE __m256i narrowed(Vec v) { return (__m256i)_mm512_cvtneps_pbh((__m512)v); }
RLNAS_INLINE Vec load_half(const Half* p, int64_t count) {
  return widened(_mm256_maskz_loadu_epi16(lanes_mask(count), p));
}
RLNAS_INLINE Vec load_half(const Half* p) {
  return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
RLNAS_INLINE void store_half(Half* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
RLNAS_INLINE __m512i paired(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// What is done with the sums of a tile; known when it is compiled, for two dozen times its questions would
// take longer than its answers.
enum class Write { sums, added, half, scaled, begun };

Write write_of(const PairOut& c) {
  if (c.sums) return c.accumulate ? Write::added : Write::sums;
  return c.row_scale ? Write::scaled : c.init ? Write::begun : Write::half;
}

// As `column` of gemm.h.
template <int R, int V, Order order, Write write>
static __attribute__((noinline)) void pair_column(int64_t tiles, int64_t pairs, LeftPairs a, int64_t next,
                                                  const Pair* b, int64_t ldb, const PairOut& c, int64_t m,
                                                  int64_t n, int64_t last) {
  const __mmask16 some = lanes_mask(last);
  const auto mask_of = [&](int v) __attribute__((always_inline)) { return v == V - 1 ? some : kAll; };
  const auto beyond = [](auto* data, int64_t count) { return data ? data + count : nullptr; };
  const int64_t ld = c.ld, init_ld = c.init_ld;
  const float* bias = beyond(c.bias, n);
  float* wide = beyond(c.sums, m * ld + n);
  Half* half = beyond(c.half, m * ld + n);
  const Half* init = beyond(c.init, m * init_ld + n);
  const float* scale = beyond(c.row_scale, m);
  for (; tiles > 0; tiles--) {
    __m512 sums[R][V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      const __m512 from = bias ? _mm512_maskz_loadu_ps(mask_of(v), bias + v * kWidth) : _mm512_setzero_ps();
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) sums[r][v] = from;
    }
    take_steps<R, V, order>(
        pairs, a, LeftPairs{b, ldb},
        [&](const Pair* at, int v)
            __attribute__((always_inline)) { return _mm512_maskz_loadu_epi32(mask_of(v), at); },
        [&](int r, int v, uint32_t left, __m512i right) __attribute__((always_inline)) {
          const __m512i all = _mm512_set1_epi32(static_cast<int>(left));
          sums[r][v] = _mm512_dpbf16_ps(sums[r][v], (__m512bh)all, (__m512bh)right);
        },
        [&](int r) __attribute__((always_inline)) {
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) {
            __m512& sum = sums[r][v];
            if constexpr (write == Write::added)
              sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask_of(v), wide + v * kWidth));
            if constexpr (write == Write::sums || write == Write::added)
              _mm512_mask_storeu_ps(wide + v * kWidth, mask_of(v), sum);
            if constexpr (write == Write::scaled) sum = _mm512_mul_ps(sum, _mm512_set1_ps(*scale));
            if constexpr (write == Write::begun) {
              const __m256i from = _mm256_maskz_loadu_epi16(mask_of(v), init + v * kWidth);
              sum = _mm512_add_ps(sum, (__m512)widened(from));
            }
          }
          if constexpr (write == Write::sums || write == Write::added) {
            wide += ld;
            return;
          } else if constexpr (V == 2) {
            _mm512_mask_storeu_epi16(half, _mm512_kunpackw(some, kAll),
                                     (__m512i)_mm512_cvtne2ps_pbh(sums[r][1], sums[r][0]));
          } else {
            _mm256_mask_storeu_epi16(half, some, narrowed((Vec)sums[r][0]));
          }
          half += ld;
          if constexpr (write == Write::scaled) scale++;
          if constexpr (write == Write::begun) init += init_ld;
        });
    a.data += next;
  }
}

template <int V, Order order, Write write, int R = kRows>
RLNAS_INLINE void pair_column_of(int64_t rows, int64_t tiles, int64_t pairs, LeftPairs a, int64_t next,
                                 const Pair* b, int64_t ldb, const PairOut& c, int64_t m, int64_t n,
                                 int64_t last) {
  if constexpr (R > 0) {
    if (rows == R)
      pair_column<R, V, order, write>(tiles, pairs, a, next, b, ldb, c, m, n, last);
    else
      pair_column_of<V, order, write, R - 1>(rows, tiles, pairs, a, next, b, ldb, c, m, n, last);
  }
}

template <Order order, Write write>
void pair_gemm_to(int64_t rows, int64_t columns, int64_t pairs, LeftPairs a, RightPairs b, const PairOut& c) {
  const int64_t down = order == Order::row_major ? a.ld : 1;  // from one row to the next
  for (int64_t n = 0; n < columns; n += kPanel) {
    const int64_t left = std::min<int64_t>(columns - n, kPanel);
    const Pair* panel = b.data + n / kPanel * b.stride;
    each_height(rows, [&](int64_t m, int64_t some, int64_t tiles) {
      const LeftPairs from{a.data + m * down, a.ld};
      const int64_t next = some * down;
      if (left > kWidth)
        pair_column_of<2, order, write>(some, tiles, pairs, from, next, panel, b.ld, c, m, n, left - kWidth);
      else
        pair_column_of<1, order, write>(some, tiles, pairs, from, next, panel, b.ld, c, m, n, left);
    });
  }
}

template <Order order>
void pair_gemm(int64_t rows, int64_t columns, int64_t pairs, LeftPairs a, RightPairs b, const PairOut& c) {
  switch (write_of(c)) {
    case Write::sums: return pair_gemm_to<order, Write::sums>(rows, columns, pairs, a, b, c);
    case Write::added: return pair_gemm_to<order, Write::added>(rows, columns, pairs, a, b, c);
    case Write::half: return pair_gemm_to<order, Write::half>(rows, columns, pairs, a, b, c);
    case Write::scaled: return pair_gemm_to<order, Write::scaled>(rows, columns, pairs, a, b, c);
    case Write::begun: return pair_gemm_to<order, Write::begun>(rows, columns, pairs, a, b, c);
  }
}

LeftPairs left(const Half* data, int64_t ld) { return {reinterpret_cast<const Pair*>(data), ld / 2}; }
LeftPairs left_of(HalfRows rows) { return left(rows.data, rows.ld); }

// Pairs of adjacent rows: to[r / 2][c] = (row r, row r + 1), the last one padded with 0.
void interleave(HalfRows rows, int64_t count, int64_t columns, Pair* to, int64_t ld) {
  for (int64_t r = 0; r < count; r += 2)
    for (int64_t c = 0; c < columns; c += kWidth) {
      const __mmask16 mask = lanes_mask(std::min<int64_t>(kWidth, columns - c));
      const __m256i low = _mm256_maskz_loadu_epi16(mask, rows.at(r) + c);
      const __m256i high =
          _mm256_maskz_loadu_epi16(r + 1 < count ? mask : 0, rows.at(r + 1 < count ? r + 1 : r) + c);
      _mm512_mask_storeu_epi32(to + r / 2 * ld + c, mask, paired(low, high));
    }
}

// The same as panels [panel][row / 2][kPanel] of a right operand, which a product reads line by line.
RightPairs pair_panels(HalfRows rows, int64_t count, int64_t columns, float* buffer) {
  Pair* to = reinterpret_cast<Pair*>(buffer);
  const int64_t stride = ceil_divide(count, 2) * kPanel;
  for (int64_t c = 0; c < columns; c += kPanel)
    interleave({rows.data + c, rows.ld}, count, std::min<int64_t>(kPanel, columns - c),
               to + c / kPanel * stride, kPanel);
  return {to, kPanel, stride};
}
int64_t panels_size(int64_t count, int64_t columns) {
  return ceil_divide(count, 2) * ceil_divide(columns, kPanel) * kPanel;
}

// Queries in the lanes: panels [panel][channel / 2][kPanel] of pairs.
RightPairs pair_lanes(HalfRows rows, int64_t count, int64_t channels, float* buffer) {
  const Rows words{reinterpret_cast<float*>(rows.data), rows.ld / 2};
  const Right panels = lanes_from(words, count, channels / 2, buffer);
  return {reinterpret_cast<const Pair*>(panels.data), panels.ld, panels.stride};
}

void narrow(const float* from, int64_t count, int64_t columns, HalfRows to) {
  for (int64_t n = 0; n < count; n++)
    for (int64_t c = 0; c < columns; c += kWidth) {
      const int64_t some = std::min<int64_t>(kWidth, columns - c);
      _mm256_mask_storeu_epi16(to.at(n) + c, lanes_mask(some),
                               narrowed(load_some(from + n * columns + c, some)));
    }
}

void widen(HalfRows from, int64_t count, int64_t columns, Rows to) {
  for (int64_t n = 0; n < count; n++)
    for (int64_t c = 0; c < columns; c += kWidth) {
      const int64_t some = std::min<int64_t>(kWidth, columns - c);
      store_some(to.at(n) + c, load_half(from.at(n) + c, some), some);
    }
}

void add_halves(HalfRows from, int64_t count, int64_t columns, Rows to) {
  for (int64_t n = 0; n < count; n++)
    for (int64_t c = 0; c < columns; c += kWidth) {
      const int64_t some = std::min<int64_t>(kWidth, columns - c);
      store_some(to.at(n) + c, load_some(to.at(n) + c, some) + load_half(from.at(n) + c, some), some);
    }
}

// Pairs of a right operand from float32 weights [depth][columns] or, transposed, [columns][depth].
class WeightPairs {
 public:
  WeightPairs(const Buffer& weights, int64_t depth, int64_t columns, bool transposed, int threads)
      : halves_(ceil_divide(weights.size(), 2)), pairs_(panels_size(depth, columns)) {
    const int64_t lines = transposed ? columns : depth, length = transposed ? depth : columns;
    const HalfRows rows{reinterpret_cast<Half*>(halves_.data()), length};
    spread(threads, ceil_divide(lines, kPanel), weights.size(), [&](int64_t index) {
      const Range r(index, kPanel, lines);
      narrow(weights.data() + r.first * length, r.count(), length, rows.below(r.first));
    });
    const int64_t stride = depth / 2 * kPanel;
    spread(threads, ceil_divide(columns, kPanel), weights.size(), [&](int64_t index) {
      const Range r(index, kPanel, columns);
      float* panel = pairs_.data() + index * stride;
      if (transposed)
        pair_lanes(rows.below(r.first), r.count(), depth, panel);
      else
        pair_panels(rows.beside(r.first), depth, r.count(), panel);
    });
    right_ = {reinterpret_cast<const Pair*>(pairs_.data()), kPanel, stride};
  }
  RightPairs right() const { return right_; }

 private:
  Buffer halves_, pairs_;
  RightPairs right_;
};

// Whether an image's rows are whole pairs that lie in memory.
bool in_pairs(const Image& image) { return image.rows_follow() && image.step() % 2 == 0; }
HalfRows half_rows(const Image& image) { return {image.row<Half>(0), image.step()}; }

// Calls task(line, row, positions, pairs) for blocks of kWidth positions by kWidth pairs of channels of an
// image with channels first: `line` is that of the first channel, `row` the pairs of the first position.
template <class Task>
void over_pair_blocks(const Image& image, int64_t count, HalfRows rows, int64_t columns, Task task) {
  for (int64_t c = 0; c < columns; c += 2 * kWidth)
    for (int64_t n = 0; n < count; n += kWidth)
      task(image.row<Half>(n) + c * image.channel_step(), reinterpret_cast<Pair*>(rows.at(n) + c),
           lanes_mask(std::min<int64_t>(kWidth, count - n)), std::min<int64_t>(kWidth, (columns - c) / 2));
}

// Rows from the lines of channels.
void transpose_in(const Image& image, int64_t count, int64_t columns, HalfRows rows) {
  const int64_t step = image.channel_step(), ld = rows.ld / 2;
  over_pair_blocks(image, count, rows, columns,
                   [&](const Half* line, Pair* row, __mmask16 positions, int64_t pairs) {
                     Vec block[kWidth];
                     const Half* even = line;
#pragma GCC unroll 16
                     for (int i = 0; i < kWidth; i++) {
                       block[i] = (Vec)paired(_mm256_maskz_loadu_epi16(positions, even),
                                              _mm256_maskz_loadu_epi16(positions, even + step));
                       if (i + 1 < pairs) even += 2 * step;  // the last pair again, where there is no other
                     }
                     transpose(block);
#pragma GCC unroll 16
                     for (int i = 0; i < kWidth; i++)
                       if (positions >> i & 1)
                         _mm512_mask_storeu_epi32(row + i * ld, lanes_mask(pairs), (__m512i)block[i]);
                   });
}

// Lines of channels from rows.
void transpose_out(const Image& image, HalfRows rows, int64_t count, int64_t columns) {
  const int64_t step = image.channel_step(), ld = rows.ld / 2;
  over_pair_blocks(
      image, count, rows, columns, [&](Half* line, const Pair* row, __mmask16 positions, int64_t pairs) {
        Vec block[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; i++)
          block[i] = (Vec)_mm512_maskz_loadu_epi32(positions >> i & 1 ? lanes_mask(pairs) : 0, row + i * ld);
        transpose(block);
        for (int64_t i = 0; i < pairs; i++) {
          const __m512i both = (__m512i)block[i];
          Half* even = line + 2 * i * step;
          _mm256_mask_storeu_epi16(even, positions, _mm512_cvtepi32_epi16(both));
          _mm256_mask_storeu_epi16(even + step, positions,
                                   _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
        }
      });
}

// Rows of an image where they lie, or copied to `buffer` from any layout.
HalfRows half_rows(const Image& image, int64_t count, int64_t columns, float* buffer) {
  if (in_pairs(image)) return half_rows(image);
  const HalfRows to{reinterpret_cast<Half*>(buffer), columns};
  if (image.channels_first()) {
    transpose_in(image, count, columns, to);
    return to;
  }
  for (int64_t n = 0; n < count; n += kRowBlock) {
    const int64_t some = std::min(kRowBlock, count - n);
    narrow(image.load(n, n + some, scratch<kX>(kRowBlock * columns)).data, some, columns,
           {to.at(n), columns});
  }
  return to;
}

// Where rows are to be written before `finish`.
HalfRows half_target(const Image& image, int64_t columns, float* buffer) {
  return in_pairs(image) ? half_rows(image) : HalfRows{reinterpret_cast<Half*>(buffer), columns};
}

void finish(const Image& image, HalfRows rows, int64_t count, int64_t columns) {
  if (in_pairs(image)) return;
  if (image.channels_first()) return transpose_out(image, rows, count, columns);
  const Rows wide{scratch<kX>(kRowBlock * columns), columns};
  for (int64_t n = 0; n < count; n += kRowBlock) {
    const int64_t some = std::min(kRowBlock, count - n);
    for (int64_t r = 0; r < some; r++)
      for (int64_t c = 0; c < columns; c += kWidth) {
        const int64_t left = std::min<int64_t>(kWidth, columns - c);
        store_some(wide.at(r) + c, load_half(rows.at(n + r) + c, left), left);
      }
    image.finish(n, n + some, wide);
  }
}

void add_half_columns(HalfRows rows, int64_t count, int64_t columns, float* total) {
  for (int64_t c = 0; c < columns; c += kWidth) {
    const int64_t some = std::min<int64_t>(kWidth, columns - c);
    Vec sum = load_some(total + c, some);
    for (int64_t n = 0; n < count; n++) sum += load_half(rows.at(n) + c, some);
    store_some(total + c, sum, some);
  }
}

// Saved buffers hold bfloat16 in the first half of their float32 room.
HalfRows saved_rows(float* data, int64_t b, int64_t N, int64_t columns) {
  return {reinterpret_cast<Half*>(data) + b * N * columns, columns};
}

// Projects an image behind the Q columns of `rows` that are x itself.  Returns keys and values, which lie in
// `rows`, or pooled in a buffer of the thread's; their winners go to `winners` of image b, if not null.
HalfRows project_pairs(const Block& k, HalfRows from, RightPairs project, uint8_t* winners, int64_t b,
                       HalfRows rows) {
  const int64_t L = k.L, N = k.N, M = k.M, width = k.D + k.E;
  const float* bias = k.has_bias ? k.bias.data() : nullptr;
  if (!k.pools()) {
    pair_gemm<Order::row_major>(N, k.W, k.C / 2, left_of(from), project,
                                {nullptr, rows.data + k.Q, L, false, nullptr, 0, bias});
    return {rows.data + k.K, L};
  }
  // The winners are found before the rounding, which would make many of them equal.
  float *wide = scratch<kFree + 5>(N * L), *pooled = scratch<kFree + 6>(M * width);
  winners = winners ? winners + b * M * width : reinterpret_cast<uint8_t*>(scratch<kFree + 3>(M * width));
  widen(rows, N, k.Q, {wide, L});
  pair_gemm<Order::row_major>(N, k.W, k.C / 2, left_of(from), project, {wide + k.Q, nullptr, L});
  if (bias) add_bias({wide + k.Q, L}, N, k.W, bias);
  narrow(wide, N, L, rows);
  k.pool_keys({0, M, M}, wide, pooled, winners);
  const HalfRows keys{reinterpret_cast<Half*>(scratch<kFree + 2>(M * width)), width};
  narrow(pooled, M, width, keys);
  return keys;
}

// Pooled keys and values again, from the rows and the winners.
HalfRows pooled_pairs(const Block& k, HalfRows rows, const uint8_t* winners, float* buffer) {
  const HalfRows keys{reinterpret_cast<Half*>(buffer), k.D + k.E};
  for (int64_t m = 0; m < k.M; m++)
    for (int64_t c = 0; c < keys.ld; c++)
      keys.at(m)[c] = rows.at(k.position(m, winners[m * keys.ld + c]))[k.K + c];
  return keys;
}

}  // namespace
}  // namespace rlnas::RLNAS_ISA
#endif
