// The dot-product block in bfloat16 for CPUs with vdpbf16ps, in the order of the float32 block
// (dot_product.isa.cpp): z = x + Q mixed with mixed = P^T W_z^T and P^T = sum_j k_j v_j^T / M, rows [D][E].
#include "cpu/pairs.h"

namespace rlnas::RLNAS_ISA {

#ifdef __AVX512BF16__
bool bf16_dot_product_serves(const BlockShape& shape, const View& x) {
  return x.dtype == DType::bfloat16 && shape.batch > 1 && shape.channels % 2 == 0 && shape.inner % 2 == 0 &&
         shape.value % 2 == 0;
}

void bf16_dot_product_forward(const BlockShape& shape, const BlockWeights& given, const View& x,
                              const View& z, const BlockSaved& saved) {
  const Block k(shape, given);
  const int64_t C = k.C, D = k.D, E = k.E, L = k.L, N = k.N, M = k.M;
  const WeightPairs project(k.projection, C, L, true, shape.threads),
      output(k.out, E, C, true, shape.threads);
  const float* out_bias = k.has_bias ? k.out_bias.data() : nullptr;
  const std::vector<float> scale(D, 1.0f / static_cast<float>(M));
  over_whole_images(shape.batch, shape.threads, shape.deterministic, [&](int64_t b) {
    const Image image(x, b, C, shape.space), result(z, b, C, shape.space);
    const HalfRows from = half_rows(image, N, C, scratch<kGradZ>(N * C)),
                   to = half_target(result, C, scratch<kFree + 4>(N * C));
    const HalfRows rows = saved.projections ? saved_rows(saved.projections, b, N, L)
                                            : HalfRows{reinterpret_cast<Half*>(scratch<kFree>(N * L)), L};
    const HalfRows small = saved.attention ? saved_rows(saved.attention, b, D, E)
                                           : HalfRows{reinterpret_cast<Half*>(scratch<kOut>(D * E)), E};
    const HalfRows mixed = saved.terms ? saved_rows(saved.terms, b, D, C)
                                       : HalfRows{reinterpret_cast<Half*>(scratch<kLogits>(D * C)), C};
    const HalfRows keys = project_pairs(k, from, project.right(), saved.winners, b, rows);
    Pair* lefts = reinterpret_cast<Pair*>(scratch<kGradLogits>(ceil_divide(M, 2) * D));
    interleave(keys, M, D, lefts, D);
    pair_gemm<Order::depth_major>(
        D, E, ceil_divide(M, 2), {lefts, D},
        pair_panels({keys.data + D, keys.ld}, M, E, scratch<kFree + 1>(panels_size(M, E))),
        {nullptr, small.data, E, false, nullptr, 0, nullptr, scale.data()});
    pair_gemm<Order::row_major>(D, C, E / 2, left_of(small), output.right(), {nullptr, mixed.data, C});
    pair_gemm<Order::row_major>(
        N, C, D / 2, left_of(rows), pair_panels(mixed, D, C, scratch<kQueries>(panels_size(D, C))),
        {nullptr, to.data, to.ld, false, shape.residual ? from.data : nullptr, from.ld, out_bias});
    finish(result, to, N, C);
  });
}

void bf16_dot_product_backward(const BlockShape& shape, const BlockWeights& given, const View& x,
                               const View& grad_z, const BlockSaved& saved, const View& grad_x,
                               const BlockGradients& gradients) {
  const Block k(shape, given);
  const int64_t C = k.C, D = k.D, E = k.E, L = k.L, N = k.N, M = k.M, width = D + E;
  const WeightPairs project_back(k.projection, L, C, false, shape.threads),
      output_back(k.out, C, E, false, shape.threads);
  const std::vector<float> scale(D, 1.0f / static_cast<float>(M));
  WeightSums sums(k, shape.threads);
  over_whole_images(shape.batch, shape.threads, shape.deterministic, [&](int64_t b) {
    float *projection = sums.part(omp_get_thread_num()), *out = projection + L * C, *bias = out + C * E;
    const Image image(x, b, C, shape.space), upstream(grad_z, b, C, shape.space),
        result(grad_x, b, C, shape.space);
    const HalfRows from = half_rows(image, N, C, scratch<kFree + 3>(N * C)),
                   grad = half_rows(upstream, N, C, scratch<kGradZ>(N * C)),
                   to = half_target(result, C, scratch<kFree + 4>(N * C));
    const HalfRows rows = saved_rows(saved.projections, b, N, L),
                   small = saved_rows(saved.attention, b, D, E);
    const HalfRows grads{reinterpret_cast<Half*>(scratch<kFree>(N * L)), L};
    const uint8_t* winners = saved.winners ? saved.winners + b * M * width : nullptr;
    const HalfRows keys = k.pools() ? pooled_pairs(k, rows, winners, scratch<kFree + 5>(M * width))
                                    : HalfRows{rows.data + D, L};
    Half* spare = reinterpret_cast<Half*>(scratch<kLogits>(D * C + D * E));
    const HalfRows mixed = saved_rows(saved.terms, b, D, C), grad_mixed{spare, C},
                   grad_small{spare + D * C, E};
    const int64_t pairs = ceil_divide(N, 2), widest = std::max({C, E, L, D});
    Pair* lefts = reinterpret_cast<Pair*>(scratch<kFree + 6>(std::max(pairs, ceil_divide(D, 2)) * widest));
    float* rights = scratch<kFree + 2>(panels_size(std::max({N, D, E, C}), widest));
    interleave(rows, N, D, lefts, D);
    pair_gemm<Order::depth_major>(D, C, pairs, {lefts, D}, pair_panels(grad, N, C, rights),
                                  {nullptr, grad_mixed.data, C});
    interleave(grad_mixed, D, C, lefts, C);
    pair_gemm<Order::depth_major>(C, E, ceil_divide(D, 2), {lefts, C}, pair_panels(small, D, E, rights),
                                  {out, nullptr, E, true});
    pair_gemm<Order::row_major>(D, E, C / 2, left_of(grad_mixed), output_back.right(),
                                {nullptr, grad_small.data, E, false, nullptr, 0, nullptr, scale.data()});
    // Gradients of the projections.
    pair_gemm<Order::row_major>(N, D, C / 2, left_of(grad), pair_lanes(mixed, D, C, rights),
                                {nullptr, grads.data, L});
    const HalfRows grad_keys = k.pools()
                                   ? HalfRows{reinterpret_cast<Half*>(scratch<kFree + 1>(M * width)), width}
                                   : HalfRows{grads.data + D, L};
    pair_gemm<Order::row_major>(M, D, E / 2, left(keys.data + D, keys.ld),
                                pair_lanes(grad_small, D, E, rights),
                                {nullptr, grad_keys.data, grad_keys.ld});
    pair_gemm<Order::row_major>(M, E, D / 2, left_of(keys), pair_panels(grad_small, D, E, rights),
                                {nullptr, grad_keys.data + D, grad_keys.ld});
    if (k.pools()) {
      for (int64_t n = 0; n < N; n++) std::memset(grads.at(n) + D, 0, sizeof(Half) * width);
      for (int64_t m = 0; m < M; m++)
        for (int64_t c = 0; c < width; c++)
          grads.at(k.position(m, winners[m * width + c]))[D + c] = grad_keys.at(m)[c];
    }
    pair_gemm<Order::row_major>(
        N, C, L / 2, left_of(grads), project_back.right(),
        {nullptr, to.data, to.ld, false, shape.residual ? grad.data : nullptr, grad.ld});
    finish(result, to, N, C);
    interleave(grads, N, L, lefts, L);
    pair_gemm<Order::depth_major>(L, C, pairs, {lefts, L}, pair_panels(from, N, C, rights),
                                  {projection, nullptr, C, true});
    if (k.has_bias) {
      add_half_columns(grads, N, L, bias);
      add_half_columns(grad, N, C, bias + L);
    }
  });
  sums.store(gradients);
}
#else
bool bf16_dot_product_serves(const BlockShape&, const View&) { return false; }
void bf16_dot_product_forward(const BlockShape&, const BlockWeights&, const View&, const View&,
                              const BlockSaved&) {}
void bf16_dot_product_backward(const BlockShape&, const BlockWeights&, const View&, const View&,
                               const BlockSaved&, const View&, const BlockGradients&) {}
#endif

}  // namespace rlnas::RLNAS_ISA
