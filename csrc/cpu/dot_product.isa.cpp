// The dot-product block by reassociation: z = x + theta (W_z P)^T with P = sum_j g_j phi_j^T / M, O(N C C')
// and nothing of size N x M.
#include "cpu/nonlocal_block.h"

namespace rlnas::RLNAS_ISA {
namespace {

constexpr int64_t kOutputRows = 48;  // rows of a small product that one task computes

// Shares the rows of C [rows][columns] = A B among the team.
template <Order order>
void shared_gemm(bool team, int64_t rows, int64_t columns, int64_t depth, Left a, Right b, Out c) {
  share(team, ceil_divide(rows, kOutputRows), [&](int64_t block) {
    const Range r(block, kOutputRows, rows);
    const Left from{a.data + r.first * (order == Order::row_major ? a.ld : 1), a.ld};
    Out to = c;
    to.data += r.first * c.ld;
    if (c.init) to.init += r.first * c.init_ld;
    if (c.row_scale) to.row_scale += r.first;
    gemm<order>(r.count(), columns, depth, from, b, to);
  });
}

struct SharedBuffers {
  std::vector<float> rows, keys, mixed, transposed, small;
  std::vector<uint8_t> winners;
};

}  // namespace

void dot_product_forward(const BlockShape& shape, const BlockWeights& weights, const View& x, const View& z,
                         const BlockSaved& saved) {
  if (bf16_dot_product_serves(shape, x)) return bf16_dot_product_forward(shape, weights, x, z, saved);
  const Block k(shape, weights);
  const int64_t C = k.C, D = k.D, E = k.E, L = k.L, width = D + E;
  Buffer projection_panels, out_panels;
  const Right project = packed(k.projection.data(), C, L, true, projection_panels, shape.threads);
  const Right output = packed(k.out.data(), E, C, true, out_panels, shape.threads);
  const std::vector<float> scale(std::max(D, E), 1.0f / static_cast<float>(k.M));
  SharedBuffers shared;
  over_images(shape.batch, shape.threads, shape.deterministic, [&](int64_t b, bool team) {
    const Image image(x, b, C, shape.space), result(z, b, C, shape.space);
    if (team) {
#pragma omp single
      {
        shared.rows.resize(saved.projections ? 0 : k.N * L);
        shared.keys.resize(k.pools() ? k.M * width : 0);
        shared.winners.resize(k.pools() && !saved.winners ? k.M * width : 0);
        shared.small.resize(saved.attention ? 0 : E * D);
        shared.mixed.resize(saved.terms ? 0 : D * C);
      }
    }
    float* rows = saved.projections ? saved.projections + b * k.N * L
                  : team            ? shared.rows.data()
                                    : scratch<kFree>(k.N * L);
    float* pooled = !k.pools() ? nullptr : team ? shared.keys.data() : scratch<kFree + 1>(k.M * width);
    uint8_t* winners = saved.winners        ? saved.winners + b * k.M * width
                       : team || !k.pools() ? shared.winners.data()
                                            : reinterpret_cast<uint8_t*>(scratch<kFree + 2>(k.M * width));
    float* small = saved.attention ? saved.attention + b * E * D
                   : team          ? shared.small.data()
                                   : scratch<kOut>(E * D);
    float* mixed = saved.terms ? saved.terms + b * D * C
                   : team      ? shared.mixed.data()
                               : scratch<kLogits>(D * C);
    share(team, ceil_divide(k.N, kRowBlock), [&](int64_t block) {
      const Range r(block, kRowBlock, k.N);
      const Rows from = image.load(r.first, r.last, scratch<kX>(kRowBlock * C));
      gemm<Order::row_major>(r.count(), L, C, {from.data, from.ld}, project,
                             {rows + r.first * L, L, k.has_bias ? k.bias.data() : nullptr, 0});
    });
    if (k.pools())
      share(team, ceil_divide(k.M, kRowBlock),
            [&](int64_t block) { k.pool_keys(Range(block, kRowBlock, k.M), rows, pooled, winners); });
    const KeyValue keys = k.keys_of(rows, pooled);
    shared_gemm<Order::depth_major>(team, E, D, k.M, {keys.value.data, keys.value.ld},
                                    {keys.key.data, keys.key.ld}, {small, D, nullptr, 0, scale.data()});
    shared_gemm<Order::depth_major>(team, D, C, E, {small, D}, output, {mixed, C});
    share(team, ceil_divide(k.N, kRowBlock), [&](int64_t block) {
      const Range r(block, kRowBlock, k.N);
      const Rows to = result.target(r.first, scratch<kGradZ>(kRowBlock * C));
      Out out{to.data, to.ld, k.has_bias ? k.out_bias.data() : nullptr, 0};
      if (shape.residual) {
        const Rows from = image.load(r.first, r.last, scratch<kX>(kRowBlock * C));
        out.init = from.data;
        out.init_ld = from.ld;
      }
      gemm<Order::row_major>(r.count(), C, D, {rows + r.first * L, L}, {mixed, C}, out);
      if (shape.residual && k.has_bias) add_bias(to, r.count(), C, k.out_bias.data());
      result.finish(r.first, r.last, to);
    });
  });
}

void dot_product_backward(const BlockShape& shape, const BlockWeights& weights, const View& x,
                          const View& grad_z, const BlockSaved& saved, const View& grad_x,
                          const BlockGradients& gradients) {
  if (bf16_dot_product_serves(shape, x))
    return bf16_dot_product_backward(shape, weights, x, grad_z, saved, grad_x, gradients);
  const Block k(shape, weights);
  const int64_t C = k.C, D = k.D, E = k.E, L = k.L, N = k.N, M = k.M, width = D + E;
  Buffer projection_panels;
  const Right project_back = packed(k.projection.data(), L, C, false, projection_panels, shape.threads);
  const std::vector<float> scale(kRowBlock, 1.0f / static_cast<float>(M));
  WeightSums sums(k, shape.threads);
  SharedBuffers shared;
  over_images(shape.batch, shape.threads, shape.deterministic, [&](int64_t b, bool team) {
    const Image image(x, b, C, shape.space), upstream(grad_z, b, C, shape.space),
        result(grad_x, b, C, shape.space);
    const int thread = omp_get_thread_num();
    float *rows = saved.projections + b * N * L, *small = saved.attention + b * E * D;
    const uint8_t* winners = k.pools() ? saved.winners + b * M * width : nullptr;
    const int64_t floats = N * C + 3 * D * C + 3 * E * D;
    if (team) {
#pragma omp single
      {
        shared.rows.resize(N * L);
        shared.keys.resize(k.pools() ? 2 * M * width : 0);
        shared.small.resize(floats);
      }
    }
    float* grads = team ? shared.rows.data() : scratch<kFree>(N * L);
    float* pooled = !k.pools() ? nullptr : team ? shared.keys.data() : scratch<kFree + 1>(2 * M * width);
    float* grad_rows = team ? shared.small.data() : scratch<kFree + 2>(floats);
    float *mixed_turned = grad_rows + N * C, *grad_mixed = mixed_turned + D * C;
    float *grad_mixed_turned = grad_mixed + D * C, *grad_small = grad_mixed_turned + D * C;
    float *grad_small_turned = grad_small + E * D, *small_turned = grad_small_turned + E * D;
    if (k.pools())
      share(team, M, [&](int64_t m) {
        for (int64_t c = 0; c < width; c++)
          pooled[m * width + c] = rows[k.position(m, winners[m * width + c]) * L + D + c];
      });
    share(team, ceil_divide(N, kRowBlock), [&](int64_t block) {
      const Range r(block, kRowBlock, N);
      upstream.load(r.first, r.last, grad_rows + r.first * C);
    });
    const Rows grad = upstream.in_place() ? upstream.in_place_rows(0) : Rows{grad_rows, C};
    const KeyValue keys = k.keys_of(rows, pooled);
    // The gradients of W_z P, of P and of W_z.
    shared_gemm<Order::depth_major>(team, D, C, N, {rows, L}, {grad.data, grad.ld}, {grad_mixed, C});
    share(team, 3, [&](int64_t which) {
      if (which == 0) transpose(saved.terms + b * D * C, C, D, C, mixed_turned, D);
      if (which == 1) transpose(grad_mixed, C, D, C, grad_mixed_turned, D);
      if (which == 2) transpose(small, D, E, D, small_turned, E);
    });
    shared_gemm<Order::depth_major>(team, E, D, C, {k.out.data(), E}, {grad_mixed_turned, D},
                                    {grad_small, D});
    share(team, ceil_divide(C, kOutputRows), [&](int64_t block) {
      const Range r(block, kOutputRows, C);
      float* out = sums.out(thread) + r.first * E;
      gemm<Order::depth_major>(r.count(), E, D, {grad_mixed + r.first, C}, {small_turned, E},
                               {out, E, out, E});
    });
    share(team, 1, [&](int64_t) { transpose(grad_small, D, E, D, grad_small_turned, E); });
    // Gradients of the projections.
    const Rows grad_key = k.pools() ? Rows{pooled + M * width, width} : Rows{grads + D, L};
    const Rows grad_value{grad_key.data + D, grad_key.ld};
    share(team, ceil_divide(M, kRowBlock), [&](int64_t block) {
      const Range r(block, kRowBlock, M);
      gemm<Order::row_major>(r.count(), D, E, {keys.value.at(r.first), keys.value.ld}, {grad_small, D},
                             {grad_key.at(r.first), grad_key.ld, nullptr, 0, scale.data()});
      gemm<Order::row_major>(r.count(), E, D, {keys.key.at(r.first), keys.key.ld}, {grad_small_turned, E},
                             {grad_value.at(r.first), grad_value.ld, nullptr, 0, scale.data()});
    });
    if (k.pools()) {
      share(team, N, [&](int64_t n) { std::memset(grads + n * L + D, 0, sizeof(float) * width); });
      share(team, M, [&](int64_t m) {
        for (int64_t c = 0; c < width; c++)
          grads[k.position(m, winners[m * width + c]) * L + D + c] = grad_key.at(m)[c];
      });
    }
    share(team, ceil_divide(N, kRowBlock), [&](int64_t block) {
      const Range r(block, kRowBlock, N);
      const Rows from = image.load(r.first, r.last, scratch<kX>(kRowBlock * C));
      const Rows upstream_rows{grad.at(r.first), grad.ld}, here{grads + r.first * L, L};
      gemm<Order::row_major>(r.count(), D, C, {upstream_rows.data, upstream_rows.ld}, {mixed_turned, D},
                             {here.data, L});
      sums.add(thread, r.count(), from, upstream_rows, {nullptr, 0}, here);
      const Rows to = result.target(r.first, scratch<kOut>(kRowBlock * C));
      gemm<Order::row_major>(
          r.count(), C, L, {here.data, L}, project_back,
          {to.data, to.ld, shape.residual ? upstream_rows.data : nullptr, upstream_rows.ld});
      result.finish(r.first, r.last, to);
    });
  });
  sums.store(gradients);
}

}  // namespace rlnas::RLNAS_ISA
