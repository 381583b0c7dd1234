// The softmax block in bfloat16 for CPUs with vdpbf16ps: products of pairs along the depth, sums in float32.
//
// The plan is that of the float32 block (nonlocal_attention.isa.cpp).
#include "cpu/pairs.h"

namespace rlnas::RLNAS_ISA {

#ifdef __AVX512BF16__
namespace {

constexpr int64_t kMostPositions = 4096;  // of an image; a tile of queries holds the logits of all its keys

constexpr int64_t kMostSquare = 1024;  // positions whose N x N gradients of logits a thread holds, 2 MB

constexpr float kLog2E = 1.44269504f;

// 2^t, to 4e-6 of it: far below the rounding of what becomes bfloat16, in half the steps of `exponential`.
RLNAS_INLINE Vec power_of_two(Vec t) {
  const Vec f = (Vec)_mm512_reduce_ps((__m512)t, 1);  // t - floor(t)
  Vec p = broadcast(0.0135341679f);
  p = p * f + 0.0520114606f;
  p = p * f + 0.241442757f;
  p = p * f + 0.693003834f;
  p = p * f + 1.00000259f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)t);  // p 2^floor(t)
}

// Writes the log-sum-exp, or, if there is room for them, the terms exp(logit - maximum) [keys][ld] and the
// inverse of their sums.
void attend_pairs(HalfRows query, int64_t count, int64_t D, int64_t E, HalfRows key, int64_t keys,
                  RightPairs values, HalfRows out, HalfRows terms, float* lse) {
  constexpr int64_t T = kForwardTile;
  const int64_t lanes = ceil_divide(count, kWidth) * kWidth, pairs = ceil_divide(keys, 2);
  const RightPairs queries = pair_lanes(query, count, D, scratch<kQueries>(T * D));
  float* logits = scratch<kLogits>(T * 2 * pairs);
  uint32_t* weights = reinterpret_cast<uint32_t*>(scratch<kGradLogits>(T * pairs));
  pair_gemm<Order::row_major>(keys, lanes, D / 2, left(key.data, key.ld), queries, {logits, nullptr, T});
  float inverse[T];
  for (int64_t n = 0; n < lanes; n += kWidth) {
    const Vec highest = highest_of(logits + n, T, keys), shift = highest * kLog2E;
    Vec total = {};
    for (int64_t j = 0; j < keys; j += 2) {
      const Vec even = power_of_two(load(logits + j * T + n) * kLog2E - shift);
      const Vec odd = j + 1 < keys ? power_of_two(load(logits + (j + 1) * T + n) * kLog2E - shift) : Vec{};
      const __m256i first = narrowed(even), second = narrowed(odd);
      _mm512_storeu_si512(weights + j / 2 * T + n, paired(first, second));
      if (terms.data) {
        store_half(terms.at(j) + n, first);
        if (j + 1 < keys) store_half(terms.at(j + 1) + n, second);
      }
      total += even + odd;
    }
    store(inverse + n, 1.0f / total);
    for (int64_t i = n; lse && i < std::min(count, n + kWidth); i++)
      lse[i] = terms.data ? inverse[i] : highest[i - n] + std::log(total[i - n]);
  }
  pair_gemm<Order::depth_major>(count, E, pairs, {reinterpret_cast<const Pair*>(weights), T}, values,
                                {nullptr, out.data, out.ld, false, nullptr, 0, nullptr, inverse});
}

// Adds to the gradients of keys and values.  With kept terms, grad_out is the gradient of the mean times the
// inverse sums, so that the terms stand for the softmax; otherwise that is recomputed from the log-sum-exp.
// With `square`, the gradients of the logits go there, and nothing to queries and keys.
void attend_backward_pairs(HalfRows query, HalfRows grad_out, HalfRows terms, const float* lse, int64_t count,
                           int64_t D, int64_t E, HalfRows key, HalfRows value, int64_t keys,
                           RightPairs key_pairs, HalfRows grad_query, float* grad_key, float* grad_value,
                           HalfRows square) {
  constexpr int64_t T = kBackwardTile;
  const int64_t lanes = ceil_divide(count, kWidth) * kWidth, pairs = ceil_divide(keys, 2);
  const RightPairs grads = pair_lanes(grad_out, count, E, scratch<kGradQueries>(T * E));
  float *logits = scratch<kLogits>(2 * T * keys), *grad_logits = logits + T * keys;
  uint32_t* mixed = reinterpret_cast<uint32_t*>(scratch<kGradLogits>(T * (pairs + keys)));
  Half* own_weights = reinterpret_cast<Half*>(mixed + T * pairs);
  const HalfRows slopes = square.data ? square : HalfRows{own_weights + T * keys, T};
  const bool kept = terms.data;
  const HalfRows weights = kept ? terms : HalfRows{own_weights, T};
  if (!kept) {
    const RightPairs queries = pair_lanes(query, count, D, scratch<kQueries>(T * D));
    pair_gemm<Order::row_major>(keys, lanes, D / 2, left_of(key), queries, {logits, nullptr, T});
  }
  pair_gemm<Order::row_major>(keys, lanes, E / 2, left_of(value), grads, {grad_logits, nullptr, T});
  float shift[T] = {};
  std::memcpy(shift, lse, sizeof(float) * count);
  for (int64_t n = 0; n < lanes; n += kWidth) {
    const Vec lane_shift = load(shift + n) * kLog2E;
    for (int64_t j = 0; j < (kept ? 0 : keys); j++)
      store_half(weights.at(j) + n, narrowed(power_of_two(load(logits + j * T + n) * kLog2E - lane_shift)));
    const auto [mass, mean] = moments_over(keys, [&](int64_t j) {
      return std::pair<Vec, Vec>(load_half(weights.at(j) + n), load(grad_logits + j * T + n));
    });
    const Vec delta = mean / mass;
    const auto slope = [&](int64_t j) {
      const __m256i half = narrowed(load_half(weights.at(j) + n) * (load(grad_logits + j * T + n) - delta));
      store_half(slopes.at(j) + n, half);
      return half;
    };
    for (int64_t j = 0; j < keys; j += 2) {
      const __m256i even = slope(j), odd = j + 1 < keys ? slope(j + 1) : _mm256_setzero_si256();
      _mm512_storeu_si512(mixed + j / 2 * T + n, paired(even, odd));
    }
  }
  const int64_t depth = ceil_divide(count, 2);
  float* buffer = scratch<kGradQueries>(panels_size(T, E));  // the lanes have been used
  pair_gemm<Order::row_major>(keys, E, depth, left_of(weights), pair_panels(grad_out, count, E, buffer),
                              {grad_value, nullptr, E, true});
  if (square.data) return;
  pair_gemm<Order::depth_major>(count, D, pairs, {reinterpret_cast<const Pair*>(mixed), T}, key_pairs,
                                {nullptr, grad_query.data, grad_query.ld});
  buffer = scratch<kQueries>(panels_size(T, D));
  pair_gemm<Order::row_major>(keys, D, depth, left_of(slopes), pair_panels(query, count, D, buffer),
                              {grad_key, nullptr, D, true});
}

// Adds a square matrix to its transpose, in place; the rows up to the next multiple of kWidth are there too.
void add_transpose(HalfRows square, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth)
    for (int64_t j = i; j < count; j += kWidth) {
      Vec turned[kWidth];
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; r++) turned[r] = load_half(square.at(j + r) + i);
      transpose(turned);
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; r++) {
        turned[r] += load_half(square.at(i + r) + j);
        store_half(square.at(i + r) + j, narrowed(turned[r]));
      }
      if (i == j) continue;
      transpose(turned);
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; r++) store_half(square.at(j + r) + i, narrowed(turned[r]));
    }
}

// Terms [keys][kept_lanes(N)] of an image, or nothing.
HalfRows kept_terms(const BlockSaved& saved, int64_t b, int64_t N, int64_t M) {
  if (!saved.terms) return {nullptr, 0};
  return saved_rows(saved.terms, b, M, kept_lanes(N));
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
  const int64_t C = k.C, D = k.D, E = k.E, L = k.L, N = k.N, M = k.M;
  const WeightPairs project(k.projection, C, k.W, true, shape.threads),
      output(k.out, E, C, true, shape.threads);
  const float* out_bias = k.has_bias ? k.out_bias.data() : nullptr;
  over_whole_images(shape.batch, shape.threads, shape.deterministic, [&](int64_t b) {
    const Image image(x, b, C, shape.space), result(z, b, C, shape.space);
    const HalfRows from = half_rows(image, N, C, scratch<kGradZ>(N * C)),
                   to = half_target(result, C, scratch<kFree + 4>(N * C));
    const HalfRows rows = saved.projections ? saved_rows(saved.projections, b, N, L)
                                            : HalfRows{reinterpret_cast<Half*>(scratch<kFree>(N * L)), L};
    const HalfRows means = saved.attention ? saved_rows(saved.attention, b, N, E)
                                           : HalfRows{reinterpret_cast<Half*>(scratch<kOut>(N * E)), E};
    for (int64_t n = 0; n < (k.Q ? N : 0); n++) std::memcpy(rows.at(n), from.at(n), sizeof(Half) * k.Q);
    const HalfRows keys = project_pairs(k, from, project.right(), saved.winners, b, rows);
    const RightPairs values =
        pair_panels({keys.data + D, keys.ld}, M, E, scratch<kFree + 1>(panels_size(M, E)));
    const HalfRows terms = kept_terms(saved, b, N, M);
    for (int64_t i = 0; i < N; i += kForwardTile) {
      const int64_t count = std::min(kForwardTile, N - i);
      attend_pairs(rows.below(i), count, D, E, keys, M, values, means.below(i), terms.beside(i),
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
  const WeightPairs project_back(k.projection, k.W, C, false, shape.threads),
      output_back(k.out, C, E, false, shape.threads);
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
    const HalfRows keys = k.pools() ? pooled_pairs(k, rows, winners, scratch<kFree + 5>(M * width))
                                    : HalfRows{rows.data + k.K, L};
    float *grad_key = scratch<kFree + 1>(M * width), *grad_value = grad_key + M * D;
    std::memset(grad_key, 0, sizeof(float) * M * width);
    const int64_t pairs = (N + 1) / 2;
    const RightPairs key_pairs = pair_panels(keys, M, D, scratch<kFree + 2>(panels_size(M, D)));
    const HalfRows terms = kept_terms(saved, b, N, M);
    const int64_t side = kept_lanes(N);
    HalfRows square{nullptr, side};
    if (k.Q && !k.pools() && N <= kMostSquare) {
      square.data = reinterpret_cast<Half*>(scratch<kFree + 6>(side * side));
      std::memset(square.at(N), 0, sizeof(Half) * (side - N) * side);
    }
    pair_gemm<Order::row_major>(
        N, E, C / 2, left_of(grad), output_back.right(),
        {nullptr, grad_means.data, E, false, nullptr, 0, nullptr, terms.data ? saved.lse + b * N : nullptr});
    for (int64_t i = 0; i < N; i += kBackwardTile)
      attend_backward_pairs(rows.below(i), grad_means.below(i), terms.beside(i), saved.lse + b * N + i,
                            std::min(kBackwardTile, N - i), D, E, keys, keys.beside(D), M, key_pairs,
                            grads.below(i), grad_key, grad_value, square.beside(i));
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
    if (square.data) {  // x is queries and keys: (S + S^T) x is one product for both
      add_transpose(square, N);
      pair_gemm<Order::row_major>(N, C, pairs, left_of(square), key_pairs,
                                  {nullptr, grads.data, L, false, init.data, init.ld});
      init = grads;
    } else if (k.Q) {  // what came to x itself, summed before it is rounded
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
