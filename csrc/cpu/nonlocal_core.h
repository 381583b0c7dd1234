// The attention of one tile of queries, forward and backward, on float32 rows.
// Included by *.isa.cpp only.
#pragma once

#include <cmath>

#include "cpu/gemm.h"
#include "cpu/rows.h"

namespace rlnas::RLNAS_ISA {

// Queries lie in the lanes: logits are computed transposed, S^T [key][query], so that maximum, exponential
// and sum are vertical, no key is padded, and P^T is in the order that the next product broadcasts from.
constexpr int64_t kForwardTile = 32, kBackwardTile = 64;  // queries; multiples of every kPanel
constexpr int64_t kKeyBlock = 512;                        // keys whose logits are held at once
constexpr int64_t kKept =
    256;  // an image of at most so many positions keeps the softmax's terms for the backward
constexpr int64_t kKeptTile = 128;  // most of its queries in one tile

enum Slot { kQueries, kLogits, kGradQueries, kGradLogits, kOut, kX, kGradZ, kFree };

struct KeyValue {
  Rows key, value;
  int64_t count;
};

// Rows [first, first + count) transposed to panels [panel][channel][kPanel]; lanes beyond count are 0.
static inline Right lanes_from(Rows rows, int64_t count, int64_t channels, float* to) {
  for (int64_t n = 0; n < count; n += kPanel) {
    const int64_t some = std::min<int64_t>(kPanel, count - n);
    float* panel = to + n * channels;
    if (some < kPanel) std::memset(panel, 0, sizeof(float) * kPanel * channels);
    transpose(rows.at(n), rows.ld, some, channels, panel, kPanel);
  }
  return {to, kPanel, kPanel * channels};
}

// The maximum of each of kWidth lanes over rows, in chains that do not wait for one another.
RLNAS_INLINE Vec highest_of(const float* rows, int64_t ld, int64_t count) {
  Vec highest[4];
  for (int i = 0; i < 4; i++) highest[i] = load(rows + std::min<int64_t>(i, count - 1) * ld);
  for (int64_t j = 4; j < count; j += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
      highest[i] = maximum(highest[i], load(rows + std::min(j + i, count - 1) * ld));
  return maximum(maximum(highest[0], highest[1]), maximum(highest[2], highest[3]));
}

// In: logits [keys][tile] of one block, running maximum and sum of each lane.  Out: exp(logit - maximum).
static inline void softmax_block(float* logits, int64_t tile, int64_t keys, int64_t lanes, float* maxima,
                                 float* sums, float* rescale) {
  for (int64_t n = 0; n < lanes; n += kWidth) {
    const Vec before = load(maxima + n), highest = maximum(before, highest_of(logits + n, tile, keys));
    const Vec factor = exponential(before - highest);
    Vec total = load(sums + n) * factor;
    for (int64_t j = 0; j < keys;) {
      Vec part = {};
      for (const int64_t end = std::min(keys, j + 32); j < end; j++) {
        const Vec e = exponential(load(logits + j * tile + n) - highest);
        store(logits + j * tile + n, e);
        part += e;
      }
      total += part;
    }
    store(maxima + n, highest);
    store(sums + n, total);
    store(rescale + n, factor);
  }
}

static inline void attend(Rows query, int64_t count, int64_t inner, int64_t value, const KeyValue& keys,
                          Rows out, float* lse) {
  constexpr int64_t T = kForwardTile;
  const int64_t lanes = ceil_divide(count, kWidth) * kWidth;
  const Right queries = lanes_from(query, count, inner, scratch<kQueries>(T * inner));
  const int64_t block = std::min(keys.count, kKeyBlock);
  float* logits = scratch<kLogits>(T * block);
  float maxima[T], sums[T], rescale[T];
  std::fill(maxima, maxima + T, -3.0e38f);  // finite, so that the first rescaling is exp(-large) = 0
  std::fill(sums, sums + T, 0.0f);
  for (int64_t j = 0; j < keys.count; j += block) {
    const int64_t some = std::min(block, keys.count - j);
    gemm<Order::row_major>(some, lanes, inner, {keys.key.at(j), keys.key.ld}, queries, {logits, T});
    softmax_block(logits, T, some, lanes, maxima, sums, rescale);
    Out to{out.data, out.ld};
    if (j > 0) {
      for (int64_t i = 0; i < count; i++)
        for (int64_t e = 0; e < value; e++) out.at(i)[e] *= rescale[i];
      to.init = out.data;
      to.init_ld = out.ld;
    }
    float inverse[T];
    if (j + some == keys.count) {
      for (int64_t i = 0; i < count; i++) inverse[i] = 1.0f / sums[i];
      to.row_scale = inverse;
    }
    gemm<Order::depth_major>(count, value, some, {logits, T}, {keys.value.at(j), keys.value.ld}, to);
  }
  if (lse)
    for (int64_t i = 0; i < count; i++) lse[i] = maxima[i] + std::log(sums[i]);
}

struct Moments {
  Vec mass, mean;  // of the weights p, and of p times their gradient
};

// Over keys, term(key) = (p, gradient of p); in parts of 32 and four sums at a time: short chains, which are
// more exact and do not wait for one another.
template <class F>
RLNAS_INLINE Moments moments_over(int64_t keys, F term) {
  Moments total{};
  for (int64_t k = 0; k < keys;) {
    Vec mass[4], mean[4];  // no array of Moments: the compiler would keep it in memory
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) mass[i] = mean[i] = Vec{};
    const int64_t end = std::min(keys, k + 32);
    const auto add = [&](int i) __attribute__((always_inline)) {
      const auto [p, grad] = term(k + i);
      mass[i] += p;
      mean[i] += p * grad;
    };
    for (; k + 4 <= end; k += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) add(i);
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++)
      if (k + i < end) add(i);
    k = end;
    total.mass += (mass[0] + mass[1]) + (mass[2] + mass[3]);
    total.mean += (mean[0] + mean[1]) + (mean[2] + mean[3]);
  }
  return total;
}

// Adds this tile's share to grad_keys and writes grad_query.  `first` overwrites grad_keys.
static inline void attend_backward(Rows query, Rows out, Rows grad_out, const float* lse, int64_t count,
                                   int64_t inner, int64_t value, const KeyValue& keys, Rows grad_query,
                                   const KeyValue& grad_keys, bool first) {
  constexpr int64_t T = kBackwardTile;
  const int64_t lanes = ceil_divide(count, kWidth) * kWidth;
  const Right queries = lanes_from(query, count, inner, scratch<kQueries>(T * inner));
  const Right grad_outs = lanes_from(grad_out, count, value, scratch<kGradQueries>(T * value));
  const int64_t block = std::min<int64_t>(keys.count, kKeyBlock);
  float *weights = scratch<kLogits>(T * block), *grads = scratch<kGradLogits>(T * block);
  float delta[T] = {}, shift[T] = {};
  for (int64_t i = 0; i < count; i++) {
    shift[i] = lse[i];
    if (keys.count <= block) continue;
    Vec total = {};
    int64_t e = 0;
    for (; e + kWidth <= value; e += kWidth) total += load(grad_out.at(i) + e) * load(out.at(i) + e);
    if (e < value) total += load_some(grad_out.at(i) + e, value - e) * load_some(out.at(i) + e, value - e);
    delta[i] = sum(total);
  }
  for (int64_t j = 0; j < keys.count; j += block) {
    const int64_t some = std::min(block, keys.count - j);
    gemm<Order::row_major>(some, lanes, inner, {keys.key.at(j), keys.key.ld}, queries, {weights, T});
    gemm<Order::row_major>(some, lanes, value, {keys.value.at(j), keys.value.ld}, grad_outs, {grads, T});
    const bool whole = some == keys.count;
    for (int64_t n = 0; n < lanes; n += kWidth) {
      const Vec lane_shift = load(shift + n);
      const auto [mass, mean] = moments_over(some, [&](int64_t k) {
        const Vec p = exponential(load(weights + k * T + n) - lane_shift);
        store(weights + k * T + n, p);
        return std::pair<Vec, Vec>(p, load(grads + k * T + n));
      });
      // The rounding of lse cancels out of these quotients, so that the gradients of a row's logits sum to 0.
      const Vec lane_delta = whole ? mean / mass : load(delta + n);
      const Vec correction = whole ? 1.0f / mass : broadcast(1.0f);
#pragma GCC unroll 4
      for (int64_t k = 0; k < some; k++) {
        float *grad = grads + k * T + n, *weight = weights + k * T + n;
        const Vec p = load(weight) * correction;
        store(weight, p);
        store(grad, p * (load(grad) - lane_delta));
      }
    }
    gemm<Order::depth_major>(
        count, inner, some, {grads, T}, {keys.key.at(j), keys.key.ld},
        {grad_query.data, grad_query.ld, j > 0 ? grad_query.data : nullptr, grad_query.ld});
    float *grad_key = grad_keys.key.at(j), *grad_value = grad_keys.value.at(j);
    gemm<Order::row_major>(some, inner, count, {grads, T}, {query.data, query.ld},
                           {grad_key, grad_keys.key.ld, first ? nullptr : grad_key, grad_keys.key.ld});
    gemm<Order::row_major>(
        some, value, count, {weights, T}, {grad_out.data, grad_out.ld},
        {grad_value, grad_keys.value.ld, first ? nullptr : grad_value, grad_keys.value.ld});
  }
}

// Lanes of a row of kept terms: whole vectors on every instruction set.
static inline int64_t kept_lanes(int64_t queries) { return (queries + 15) / 16 * 16; }

// Queries of a tile of an image that keeps its terms, so that all tiles are of almost equal size.
static inline int64_t kept_tile(int64_t positions) {
  const int64_t tiles = std::max<int64_t>(1, ceil_divide(positions, kKeptTile));
  return kept_lanes(ceil_divide(positions, tiles));
}

// to[j] = row . rows_j over channels; up to the next multiple of kWidth that of the last row again.
static inline void row_products(const float* row, int64_t channels, Rows rows, int64_t count, float* to) {
  for (int64_t j = 0; j < count; j += kWidth) {
    const float* others[kWidth];
    for (int i = 0; i < kWidth; i++) others[i] = rows.at(std::min(j + i, count - 1));
    Vec parts[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; i++) parts[i] = Vec{};
    int64_t c = 0;
    for (; c + kWidth <= channels; c += kWidth) {
      const Vec own = load(row + c);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; i++) parts[i] += own * load(others[i] + c);
    }
    if (c < channels) {
      const Vec own = load_some(row + c, channels - c);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; i++) parts[i] += own * load_some(others[i] + c, channels - c);
    }
    transpose(parts);
#pragma GCC unroll 4
    for (int half = kWidth / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    store(to + j, parts[0]);
  }
}

// Queries of a tile that share lanes.  One that would be alone in a vector is worth a way of its own; of
// images with odd sides every other one has such a query, for their squares are 1 or 9 over a multiple of 16.
static inline int64_t shared_queries(int64_t count) {
  return count > kWidth && count % kWidth == 1 ? count - 1 : count;
}

// What belongs to one query: a number a key, `ld` apart.
static inline void gather_lane(const float* lane, int64_t ld, int64_t count, float* to) {
  for (int64_t j = 0; j < count; j++) to[j] = lane[j * ld];
  for (int64_t j = count; j % kWidth; j++) to[j] = 0.0f;
}
static inline void scatter_lane(const float* from, int64_t count, float* lane, int64_t ld) {
  for (int64_t j = 0; j < count; j++) lane[j * ld] = from[j];
}

// attend_kept of one query.
static inline void attend_kept_alone(const float* query, int64_t inner, const KeyValue& keys, float* lane,
                                     int64_t ld, float* inverse) {
  alignas(64) float terms[kKept + kWidth];
  row_products(query, inner, keys.key, keys.count, terms);
  float highest = terms[0];
  for (int64_t j = 1; j < keys.count; j++) highest = terms[j] > highest ? terms[j] : highest;
  Vec total = {};
  for (int64_t j = 0; j < keys.count; j += kWidth) {
    const int64_t some = std::min<int64_t>(kWidth, keys.count - j);
    store(terms + j, exponential(load(terms + j) - highest));
    total += load_some(terms + j, some);
  }
  *inverse = 1.0f / sum(total);
  scatter_lane(terms, keys.count, lane, ld);
}

// The gradients of the logits of one query, from the gradient of its mean: attend_kept_backward.
static inline void slopes_alone(const float* scaled, int64_t value, const KeyValue& keys, const float* lane,
                                int64_t ld, float* grads, int64_t grads_ld) {
  alignas(64) float terms[kKept + kWidth], slopes[kKept + kWidth];
  row_products(scaled, value, keys.value, keys.count, slopes);
  gather_lane(lane, ld, keys.count, terms);
  Vec mass = {}, mean = {};
  for (int64_t j = 0; j < keys.count; j += kWidth) {
    const Vec p = load(terms + j);
    mass += p;
    mean += p * load(slopes + j);
  }
  const Vec delta = broadcast(sum(mean) / sum(mass));
  for (int64_t j = 0; j < keys.count; j += kWidth)
    store(slopes + j, load(terms + j) * (load(slopes + j) - delta));
  scatter_lane(slopes, keys.count, grads, grads_ld);
}

// Fills terms, exp(logit - maximum), and the inverse of their sums; the mean of the values is the product of
// the two.
static inline void attend_kept(Rows query, int64_t count, int64_t inner, int64_t value, const KeyValue& keys,
                               Rows out, Rows terms, float* inverse, Ahead* ahead) {
  const int64_t shared = shared_queries(count), lanes = ceil_divide(shared, kWidth) * kWidth;
  const Right queries = lanes_from(query, shared, inner, scratch<kQueries>(kKeptTile * inner));
  gemm<Order::row_major>(keys.count, lanes, inner, {keys.key.data, keys.key.ld}, queries,
                         {terms.data, terms.ld}, ahead);
  for (int64_t n = 0; n < lanes; n += kWidth) {
    const Vec highest = highest_of(terms.data + n, terms.ld, keys.count);
    Vec total = {};
    for (int64_t j = 0; j < keys.count;) {
      Vec part = {};
      for (const int64_t end = std::min(keys.count, j + 32); j < end; j++) {
        const Vec e = exponential(load(terms.at(j) + n) - highest);
        store(terms.at(j) + n, e);
        part += e;
      }
      total += part;
    }
    store_some(inverse + n, 1.0f / total, std::min<int64_t>(kWidth, shared - n));
  }
  if (shared < count)
    attend_kept_alone(query.at(shared), inner, keys, terms.data + shared, terms.ld, inverse + shared);
  gemm<Order::depth_major>(count, value, keys.count, {terms.data, terms.ld}, {keys.value.data, keys.value.ld},
                           {out.data, out.ld, nullptr, 0, inverse}, ahead);
}

// Adds this tile's share to grad_keys, or overwrites them if `first`, and writes grad_query.  `scaled` is the
// gradient of the mean times the inverse sums, so that the terms stand for the softmax.
static inline void attend_kept_backward(Rows query, Rows scaled, int64_t count, int64_t inner, int64_t value,
                                        const KeyValue& keys, Rows terms, Rows grad_query,
                                        const KeyValue& grad_keys, bool first, Ahead* ahead) {
  const int64_t T = kept_lanes(count);
  const int64_t shared = shared_queries(count), lanes = ceil_divide(shared, kWidth) * kWidth;
  const Right upstream = lanes_from(scaled, shared, value, scratch<kGradQueries>(kKeptTile * value));
  float* grads = scratch<kGradLogits>(keys.count * T);
  gemm<Order::row_major>(keys.count, lanes, value, {keys.value.data, keys.value.ld}, upstream, {grads, T},
                         ahead);
  for (int64_t n = 0; n < lanes; n += kWidth) {
    const auto [mass, mean] = moments_over(keys.count, [&](int64_t j) {
      return std::pair<Vec, Vec>(load(terms.at(j) + n), load(grads + j * T + n));
    });
    const Vec delta = mean / mass;  // as in attend_backward
#pragma GCC unroll 4
    for (int64_t j = 0; j < keys.count; j++) {
      float* grad = grads + j * T + n;
      store(grad, load(terms.at(j) + n) * (load(grad) - delta));
    }
  }
  if (shared < count)
    slopes_alone(scaled.at(shared), value, keys, terms.data + shared, terms.ld, grads + shared, T);
  gemm<Order::depth_major>(count, inner, keys.count, {grads, T}, {keys.key.data, keys.key.ld},
                           {grad_query.data, grad_query.ld}, ahead);
  const auto add_to = [first](Rows to) { return Out{to.data, to.ld, first ? nullptr : to.data, to.ld}; };
  gemm<Order::row_major>(keys.count, inner, count, {grads, T}, {query.data, query.ld}, add_to(grad_keys.key),
                         ahead);
  gemm<Order::row_major>(keys.count, value, count, {terms.data, terms.ld}, {scaled.data, scaled.ld},
                         add_to(grad_keys.value), ahead);
}

}  // namespace rlnas::RLNAS_ISA
