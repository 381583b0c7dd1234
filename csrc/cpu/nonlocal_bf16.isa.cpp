// The softmax block in bfloat16 for CPUs with vdpbf16ps: products of pairs along the depth, sums in float32.
//
// The plan is that of the float32 block (nonlocal_attention.isa.cpp).  A left operand is bfloat16 rows as
// they lie in memory, or pairs [depth / 2][row]; a right operand is pairs [depth / 2][column].
#include "cpu/nonlocal_block.h"

namespace rlnas::RLNAS_ISA {

#ifdef __AVX512BF16__
namespace {

constexpr int64_t kMostPositions = 4096;  // of an image; a tile of queries holds the logits of all its keys

typedef uint16_t Half;  // bfloat16
typedef uint32_t Pair __attribute__((aligned(2), may_alias));

struct HalfRows {
  Half* data;
  int64_t ld;
  Half* at(int64_t row) const { return data + row * ld; }
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
  Half* half;   // bfloat16 result: init + bias + product, times row_scale
  int64_t ld;
  bool accumulate = false;
  const Half* init = nullptr;
  int64_t init_ld = 0;
  const float* bias = nullptr;
  const float* row_scale = nullptr;
};

RLNAS_INLINE __mmask16 lanes_mask(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
RLNAS_INLINE Vec widened(__m256i half) { return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16); }
RLNAS_INLINE __m256i narrowed(Vec v) { return (__m256i)_mm512_cvtneps_pbh((__m512)v); }
RLNAS_INLINE Vec load_half(const Half* p, int64_t count) {
  return widened(_mm256_maskz_loadu_epi16(lanes_mask(count), p));
}
RLNAS_INLINE __m512i paired(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

template <int R, int V, Order order>
static __attribute__((noinline)) void pair_tile(int64_t pairs, LeftPairs a, const Pair* __restrict b,
                                                int64_t ldb, PairOut c, int64_t last) {
  __m512 sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sums[r][v] = _mm512_setzero_ps();
  constexpr int kGroups = (R + 2) / 3;
  const int64_t row = order == Order::row_major ? a.ld : 1, step = order == Order::row_major ? 1 : a.ld;
  const Pair* base[kGroups];
  for (int i = 0; i < kGroups; i++) base[i] = a.data + 3 * i * row;
#pragma GCC unroll 2
  for (int64_t k = 0; k < pairs; k++) {
    __m512i right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++)
      right[v] = _mm512_maskz_loadu_epi32(v == V - 1 ? lanes_mask(last) : lanes_mask(16), b + v * kWidth);
    b += ldb;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const __m512i left = _mm512_set1_epi32(static_cast<int>(base[r / 3][(r % 3) * row]));
#pragma GCC unroll 2
      for (int v = 0; v < V; v++)
        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], (__m512bh)left, (__m512bh)right[v]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kGroups; i++) base[i] += step;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      const int64_t some = v == V - 1 ? last : kWidth;
      Vec result = (Vec)sums[r][v];
      if (c.sums) {
        float* to = c.sums + r * c.ld + v * kWidth;
        store_some(to, c.accumulate ? result + load_some(to, some) : result, some);
        continue;
      }
      if (c.bias) result += load_some(c.bias + v * kWidth, some);
      if (c.init) result += load_half(c.init + r * c.init_ld + v * kWidth, some);
      if (c.row_scale) result *= c.row_scale[r];
      _mm256_mask_storeu_epi16(c.half + r * c.ld + v * kWidth, lanes_mask(some), narrowed(result));
    }
}

template <int V, Order order, int R = kRows>
RLNAS_INLINE void pair_tile_of(int64_t rows, int64_t pairs, LeftPairs a, const Pair* b, int64_t ldb,
                               PairOut c, int64_t last) {
  if constexpr (R > 0) {
    if (rows == R)
      pair_tile<R, V, order>(pairs, a, b, ldb, c, last);
    else
      pair_tile_of<V, order, R - 1>(rows, pairs, a, b, ldb, c, last);
  }
}

template <Order order>
void pair_gemm(int64_t rows, int64_t columns, int64_t pairs, LeftPairs a, RightPairs b, PairOut c) {
  for (int64_t n = 0; n < columns; n += kPanel) {
    const int64_t left = std::min<int64_t>(columns - n, kPanel);
    const Pair* panel = b.data + n / kPanel * b.stride;
    int64_t tiles = (rows + kRows - 1) / kRows;
    for (int64_t m = 0; tiles > 0; tiles--) {
      const int64_t some = (rows - m + tiles - 1) / tiles;
      const LeftPairs from{a.data + m * (order == Order::row_major ? a.ld : 1), a.ld};
      PairOut to = c;
      if (to.sums) to.sums += m * c.ld + n;
      if (to.half) to.half += m * c.ld + n;
      if (to.init) to.init += m * c.init_ld + n;
      if (to.bias) to.bias += n;
      if (to.row_scale) to.row_scale += m;
      if (left > kWidth)
        pair_tile_of<2, order>(some, pairs, from, panel, b.ld, to, left - kWidth);
      else
        pair_tile_of<1, order>(some, pairs, from, panel, b.ld, to, left);
      m += some;
    }
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
  const int64_t stride = blocks_of(count, 2) * kPanel;
  for (int64_t c = 0; c < columns; c += kPanel)
    interleave({rows.data + c, rows.ld}, count, std::min<int64_t>(kPanel, columns - c),
               to + c / kPanel * stride, kPanel);
  return {to, kPanel, stride};
}
int64_t panels_size(int64_t count, int64_t columns) {
  return blocks_of(count, 2) * blocks_of(columns, kPanel) * kPanel;
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
  WeightPairs(const std::vector<float>& weights, int64_t depth, int64_t columns, bool transposed)
      : halves_(weights.size()), pairs_(blocks_of(columns, kPanel) * kPanel * depth / 2) {
    const HalfRows rows{halves_.data(), transposed ? depth : columns};
    narrow(weights.data(), transposed ? columns : depth, rows.ld, rows);
    right_ = transposed ? pair_lanes(rows, columns, depth, pairs_.data())
                        : pair_panels(rows, depth, columns, pairs_.data());
  }
  RightPairs right() const { return right_; }

 private:
  std::vector<Half> halves_;
  std::vector<float> pairs_;
  RightPairs right_;
};

// Whether an image's rows are whole pairs that lie in memory.
bool in_pairs(const Image& image) { return image.rows_follow() && image.step() % 2 == 0; }
HalfRows half_rows(const Image& image) { return {image.row<Half>(0), image.step()}; }

// Rows of an image where they lie, or copied to `buffer` from any layout.
HalfRows half_rows(const Image& image, int64_t count, int64_t columns, float* buffer) {
  if (in_pairs(image)) return half_rows(image);
  const HalfRows to{reinterpret_cast<Half*>(buffer), columns};
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

void attend_pairs(HalfRows query, int64_t count, int64_t D, int64_t E, HalfRows key, int64_t keys,
                  RightPairs values, HalfRows out, float* lse) {
  constexpr int64_t T = kForwardTile;
  const int64_t lanes = blocks_of(count, kWidth) * kWidth, pairs = blocks_of(keys, 2);
  const RightPairs queries = pair_lanes(query, count, D, scratch<kQueries>(T * D));
  float* logits = scratch<kLogits>(T * 2 * pairs);
  uint32_t* weights = reinterpret_cast<uint32_t*>(scratch<kGradLogits>(T * pairs));
  pair_gemm<Order::row_major>(keys, lanes, D / 2, left(key.data, key.ld), queries, {logits, nullptr, T});
  float inverse[T];
  for (int64_t n = 0; n < lanes; n += kWidth) {
    Vec highest = load(logits + n), total = {};
    for (int64_t j = 1; j < keys; j++) highest = maximum(highest, load(logits + j * T + n));
    for (int64_t j = 0; j < keys; j += 2) {
      const Vec even = exponential(load(logits + j * T + n) - highest);
      const Vec odd = j + 1 < keys ? exponential(load(logits + (j + 1) * T + n) - highest) : Vec{};
      _mm512_storeu_si512(weights + j / 2 * T + n, paired(narrowed(even), narrowed(odd)));
      total += even + odd;
    }
    for (int i = 0; i < kWidth; i++) {
      inverse[n + i] = 1.0f / total[i];
      if (lse && n + i < count) lse[n + i] = highest[i] + std::log(total[i]);
    }
  }
  pair_gemm<Order::depth_major>(count, E, pairs, {reinterpret_cast<const Pair*>(weights), T}, values,
                                {nullptr, out.data, out.ld, false, nullptr, 0, nullptr, inverse});
}

void attend_backward_pairs(HalfRows query, HalfRows grad_out, const float* lse, int64_t count, int64_t D,
                           int64_t E, HalfRows key, HalfRows value, int64_t keys, RightPairs key_pairs,
                           HalfRows grad_query, float* grad_key, float* grad_value) {
  constexpr int64_t T = kBackwardTile;
  const int64_t lanes = blocks_of(count, kWidth) * kWidth, pairs = blocks_of(keys, 2);
  const RightPairs queries = pair_lanes(query, count, D, scratch<kQueries>(T * D));
  const RightPairs grads = pair_lanes(grad_out, count, E, scratch<kGradQueries>(T * E));
  float *logits = scratch<kLogits>(2 * T * keys), *grad_logits = logits + T * keys;
  uint32_t* mixed = reinterpret_cast<uint32_t*>(scratch<kGradLogits>(T * (pairs + keys)));
  Half *weights = reinterpret_cast<Half*>(mixed + T * pairs), *slopes = weights + T * keys;
  pair_gemm<Order::row_major>(keys, lanes, D / 2, left(key.data, key.ld), queries, {logits, nullptr, T});
  pair_gemm<Order::row_major>(keys, lanes, E / 2, left(value.data, value.ld), grads,
                              {grad_logits, nullptr, T});
  float shift[T] = {};
  std::memcpy(shift, lse, sizeof(float) * count);
  for (int64_t n = 0; n < lanes; n += kWidth) {
    const Vec lane_shift = load(shift + n);
    Vec mass = {}, mean = {};
    for (int64_t j = 0; j < keys; j++) {
      const Vec p = exponential(load(logits + j * T + n) - lane_shift);
      store(logits + j * T + n, p);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + j * T + n), narrowed(p));
      mass += p;
      mean += p * load(grad_logits + j * T + n);
    }
    const Vec delta = mean / mass;
    for (int64_t j = 0; j < keys; j += 2) {
      const __m256i even = narrowed(load(logits + j * T + n) * (load(grad_logits + j * T + n) - delta));
      __m256i odd = _mm256_setzero_si256();
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(slopes + j * T + n), even);
      if (j + 1 < keys) {
        odd = narrowed(load(logits + (j + 1) * T + n) * (load(grad_logits + (j + 1) * T + n) - delta));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(slopes + (j + 1) * T + n), odd);
      }
      _mm512_storeu_si512(mixed + j / 2 * T + n, paired(even, odd));
    }
  }
  pair_gemm<Order::depth_major>(count, D, pairs, {reinterpret_cast<const Pair*>(mixed), T}, key_pairs,
                                {nullptr, grad_query.data, grad_query.ld});
  const int64_t depth = blocks_of(count, 2);
  float* buffer = scratch<kQueries>(panels_size(T, D));  // the lanes of the queries are no longer needed
  pair_gemm<Order::row_major>(keys, D, depth, left(slopes, T), pair_panels(query, count, D, buffer),
                              {grad_key, nullptr, D, true});
  buffer = scratch<kGradQueries>(panels_size(T, E));
  pair_gemm<Order::row_major>(keys, E, depth, left(weights, T), pair_panels(grad_out, count, E, buffer),
                              {grad_value, nullptr, E, true});
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

}  // namespace

// Even channels and more than one image, of which a thread takes whole ones; otherwise the float32 block
// converts.
bool bf16_block_serves(const BlockShape& shape, const View& x) {
  return x.dtype == DType::bfloat16 && shape.batch > 1 && shape.channels % 2 == 0 && shape.inner % 2 == 0 &&
         shape.value % 2 == 0 && shape.space[0] * shape.space[1] * shape.space[2] <= kMostPositions;
}

void bf16_block_forward(const BlockShape& shape, const BlockWeights& given, const View& x, const View& z,
                        const BlockSaved& saved) {
  const Block k(shape, given);
  const int64_t C = k.C, D = k.D, E = k.E, L = k.L, N = k.N, M = k.M, width = D + E;
  const WeightPairs project(k.projection, C, k.W, true), output(k.out, E, C, true);
  const float *bias = k.has_bias ? k.bias.data() : nullptr,
              *out_bias = k.has_bias ? k.out_bias.data() : nullptr;
  over_whole_images(shape.batch, shape.threads, shape.deterministic, [&](int64_t b) {
    const Image image(x, b, C, shape.space), result(z, b, C, shape.space);
    const HalfRows from = half_rows(image, N, C, scratch<kGradZ>(N * C)),
                   to = half_target(result, C, scratch<kFree + 4>(N * C));
    const HalfRows rows = saved.projections ? saved_rows(saved.projections, b, N, L)
                                            : HalfRows{reinterpret_cast<Half*>(scratch<kFree>(N * L)), L};
    const HalfRows means = saved.attention ? saved_rows(saved.attention, b, N, E)
                                           : HalfRows{reinterpret_cast<Half*>(scratch<kOut>(N * E)), E};
    HalfRows keys{rows.data + k.K, L};
    for (int64_t n = 0; n < (k.Q ? N : 0); n++) std::memcpy(rows.at(n), from.at(n), sizeof(Half) * k.Q);
    if (k.pools()) {  // the winners are found before the rounding, which would make many of them equal
      float *wide = scratch<kFree + 5>(N * L), *pooled = scratch<kFree + 6>(M * width);
      keys = {reinterpret_cast<Half*>(scratch<kFree + 2>(M * width)), width};
      uint8_t* winners = saved.winners ? saved.winners + b * M * width
                                       : reinterpret_cast<uint8_t*>(scratch<kFree + 3>(M * width));
      widen(rows, N, k.Q, {wide, L});
      pair_gemm<Order::row_major>(N, k.W, C / 2, left_of(from), project.right(), {wide + k.Q, nullptr, L});
      if (bias) add_bias({wide + k.Q, L}, N, k.W, bias);
      narrow(wide, N, L, rows);
      k.pool_keys({0, M, M}, wide, pooled, winners);
      narrow(pooled, M, width, keys);
    } else {
      pair_gemm<Order::row_major>(N, k.W, C / 2, left_of(from), project.right(),
                                  {nullptr, rows.data + k.Q, L, false, nullptr, 0, bias});
    }
    const RightPairs values =
        pair_panels({keys.data + D, keys.ld}, M, E, scratch<kFree + 1>(panels_size(M, E)));
    for (int64_t i = 0; i < N; i += kForwardTile) {
      const int64_t count = std::min(kForwardTile, N - i);
      attend_pairs({rows.at(i), L}, count, D, E, keys, M, values, {means.at(i), E},
                   saved.lse ? saved.lse + b * N + i : nullptr);
      pair_gemm<Order::row_major>(
          count, C, E / 2, left(means.at(i), E), output.right(),
          {nullptr, to.at(i), to.ld, false, shape.residual ? from.at(i) : nullptr, from.ld, out_bias});
    }
    finish(result, to, N, C);
  });
}

void bf16_block_backward(const BlockShape& shape, const BlockWeights& given, const View& x,
                         const View& grad_z, const BlockSaved& saved, const View& grad_x,
                         const BlockGradients& gradients) {
  const Block k(shape, given);
  const int64_t C = k.C, D = k.D, E = k.E, L = k.L, N = k.N, M = k.M, width = D + E;
  const WeightPairs project_back(k.projection, k.W, C, false), output_back(k.out, C, E, false);
  WeightSums sums(k, shape.threads);
  over_whole_images(shape.batch, shape.threads, shape.deterministic, [&](int64_t b) {
    float *projection = sums.part(omp_get_thread_num()), *out = projection + k.W * C, *bias = out + C * E;
    const Image image(x, b, C, shape.space), upstream(grad_z, b, C, shape.space),
        result(grad_x, b, C, shape.space);
    const HalfRows from = half_rows(image, N, C, scratch<kFree + 3>(N * C)),
                   grad = half_rows(upstream, N, C, scratch<kGradZ>(N * C)),
                   to = half_target(result, C, scratch<kFree + 4>(N * C));
    const HalfRows rows = saved_rows(saved.projections, b, N, L),
                   means = saved_rows(saved.attention, b, N, E);
    const HalfRows grad_means{reinterpret_cast<Half*>(scratch<kOut>(N * E)), E};
    const HalfRows grads{reinterpret_cast<Half*>(scratch<kFree>(N * L)), L};
    const uint8_t* winners = saved.winners ? saved.winners + b * M * width : nullptr;
    HalfRows keys{rows.data + k.K, L};
    if (k.pools()) {
      keys = {reinterpret_cast<Half*>(scratch<kFree + 5>(M * width)), width};
      for (int64_t m = 0; m < M; m++)
        for (int64_t c = 0; c < width; c++)
          keys.at(m)[c] = rows.at(k.position(m, winners[m * width + c]))[k.K + c];
    }
    float *grad_key = scratch<kFree + 1>(M * width), *grad_value = grad_key + M * D;
    std::memset(grad_key, 0, sizeof(float) * M * width);
    const int64_t pairs = (N + 1) / 2;
    const RightPairs key_pairs = pair_panels(keys, M, D, scratch<kFree + 2>(panels_size(M, D)));
    pair_gemm<Order::row_major>(N, E, C / 2, left_of(grad), output_back.right(),
                                {nullptr, grad_means.data, E});
    for (int64_t i = 0; i < N; i += kBackwardTile)
      attend_backward_pairs({rows.at(i), L}, {grad_means.at(i), E}, saved.lse + b * N + i,
                            std::min(kBackwardTile, N - i), D, E, keys, {keys.data + D, keys.ld}, M,
                            key_pairs, {grads.at(i), L}, grad_key, grad_value);
    if (k.pools()) {
      for (int64_t n = 0; n < N; n++) std::memset(grads.at(n) + D, 0, sizeof(Half) * (L - D));
      const int64_t first = k.Q ? D : 0;  // what is added to the gradient of the queries comes below
      narrow(grad_key, M, D, keys);       // the keys have been used
      narrow(grad_value, M, E, {keys.data + D, keys.ld});
      for (int64_t m = 0; m < M; m++)
        for (int64_t c = first; c < width; c++)
          grads.at(k.position(m, winners[m * width + c]))[k.K + c] = keys.at(m)[c];
    } else {
      if (!k.Q) narrow(grad_key, N, D, {grads.data + D, L});
      narrow(grad_value, N, E, {grads.data + L - E, L});
    }
    HalfRows init{shape.residual ? grad.data : nullptr, grad.ld};
    if (k.Q) {  // what came to x itself, summed before it is rounded
      const Rows own{scratch<kFree + 6>(N * C), C};
      widen(grads, N, C, own);
      if (shape.residual) add_halves(grad, N, C, own);
      for (int64_t m = 0; m < M; m++)
        if (k.pools())
          for (int64_t c = 0; c < D; c++)
            own.at(k.position(m, winners[m * width + c]))[c] += grad_key[m * D + c];
        else
          add_rows({grad_key + m * D, D}, 1, D, {own.at(m), C});
      narrow(own.data, N, C, grads);
      init = grads;
    }
    pair_gemm<Order::row_major>(N, C, k.W / 2, left(grads.data + k.Q, L), project_back.right(),
                                {nullptr, to.data, to.ld, false, init.data, init.ld});
    finish(result, to, N, C);
    Pair* lefts = reinterpret_cast<Pair*>(scratch<kFree + 5>(pairs * std::max(C, k.W)));
    float* rights = scratch<kFree + 2>(panels_size(N, std::max(C, E)));
    const HalfRows projected{grads.data + k.Q, L};
    interleave(projected, N, k.W, lefts, k.W);
    pair_gemm<Order::depth_major>(k.W, C, pairs, {lefts, k.W}, pair_panels(from, N, C, rights),
                                  {projection, nullptr, C, true});
    interleave(grad, N, C, lefts, C);
    pair_gemm<Order::depth_major>(C, E, pairs, {lefts, C}, pair_panels(means, N, E, rights),
                                  {out, nullptr, E, true});
    if (k.has_bias) {
      add_half_columns(projected, N, k.W, bias);
      add_half_columns(grad, N, C, bias + k.W);
    }
  });
  sums.store(gradients);
}
#else
bool bf16_block_serves(const BlockShape&, const View&) { return false; }
void bf16_block_forward(const BlockShape&, const BlockWeights&, const View&, const View&, const BlockSaved&) {
}
void bf16_block_backward(const BlockShape&, const BlockWeights&, const View&, const View&, const BlockSaved&,
                         const View&, const BlockGradients&) {}
#endif

}  // namespace rlnas::RLNAS_ISA
