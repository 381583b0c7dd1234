// Concatenation attention and its whole block, compiled once an instruction set.
#include "cpu/concatenation.h"

#include "cpu/concatenation_core.h"
#include "cpu/nonlocal_block.h"
#include "cpu/pairs.h"

namespace rlnas::RLNAS_ISA {
namespace {

constexpr int64_t kChunk = 32;  // channels of one sweep where a team shares an image

// One sweep, whose channels a team shares; each chunk then has its own slopes, added up in order.
void shared_sweep(bool team, const Sweep& job, int64_t channels, const Rising& queries, const Rising& keys,
                  std::vector<float>& slopes) {
  if (!team) return sweep(job, queries, keys, 0, channels);
  const int64_t chunks = ceil_divide(channels, kChunk), count = queries.count();
#pragma omp single
  slopes.resize(job.weight.data ? chunks * count : 0);
  share(true, chunks, [&](int64_t chunk) {
    const Range r(chunk, kChunk, channels);
    Sweep part = job;
    if (part.weight.data) part.slope = {slopes.data() + chunk * count, 1};
    sweep(part, queries, keys, r.first, r.last);
  });
  if (job.weight.data)
    share(true, ceil_divide(count, kRowBlock), [&](int64_t block) {
      const Range r(block, kRowBlock, count);
      for (int64_t i = r.first; i < r.last; i++) {
        float total = 0;
        for (int64_t chunk = 0; chunk < chunks; chunk++) total += slopes[chunk * count + i];
        job.slope.at(i) = total;
      }
    });
}

Column column(const float* data, int64_t stride = 1) { return {const_cast<float*>(data), stride}; }
Rows rows_of(const float* data, int64_t ld) { return {const_cast<float*>(data), ld}; }

// Of one image's rows [N][L], columns a, b, g: the means [N][E].
void sweep_image(bool team, const Block& k, float* rows, float* means, std::vector<float>& slopes) {
  const int64_t N = k.N, L = k.L;
  static thread_local Rising queries, keys;
  queries.sort({rows, L}, N);
  keys.sort({rows + 1, L}, N);
  Sweep job{1.0 / static_cast<double>(N), {rows, L}, {rows + 1, L}, {rows + 2, L}};
  job.out = {means, k.E};
  shared_sweep(team, job, k.E, queries, keys, slopes);
}

// Gradients of the rows [N][L] from those of the means [N][E].
void sweep_image_back(bool team, const Block& k, float* rows, float* grad_means, float* grads,
                      std::vector<float>& slopes) {
  const int64_t N = k.N, L = k.L, E = k.E;
  static thread_local Rising queries, keys;
  queries.sort({rows, L}, N);
  keys.sort({rows + 1, L}, N);
  const double scale = 1.0 / static_cast<double>(N);
  // Queries and keys change places for the gradients of g and b.
  const Sweep to_keys{scale,          {rows + 1, L}, {rows, L},     {grad_means, E},
                      {grads + 2, L}, {rows + 2, L}, {grads + 1, L}};
  const Sweep to_queries{scale,        {rows, L},       {rows + 1, L}, {rows + 2, L},
                         {nullptr, 0}, {grad_means, E}, {grads, L}};
  shared_sweep(team, to_keys, E, keys, queries, slopes);
  shared_sweep(team, to_queries, E, queries, keys, slopes);
}

#ifdef __AVX512BF16__
// Whether the products with the positions take bfloat16 pairs, an image a thread; rows, means and what is
// saved of them stay float32.
bool pairs_serve(const BlockShape& shape, const View& x) {
  return x.dtype == DType::bfloat16 && shape.batch > 1 && shape.channels % 2 == 0 && shape.value % 2 == 0;
}

void forward_in_pairs(const Block& k, const View& x, const View& z, const BlockSaved& saved) {
  const BlockShape& shape = k.shape;
  const int64_t C = k.C, E = k.E, L = k.L, N = k.N;
  const WeightPairs project(k.projection, C, L, true, shape.threads),
      output(k.out, E, C, true, shape.threads);
  const float* out_bias = k.has_bias ? k.out_bias.data() : nullptr;
  std::vector<float> slopes;
  over_whole_images(shape.batch, shape.threads, shape.deterministic, [&](int64_t b) {
    const Image image(x, b, C, shape.space), result(z, b, C, shape.space);
    const HalfRows from = half_rows(image, N, C, scratch<kGradZ>(N * C)),
                   to = half_target(result, C, scratch<kFree + 4>(N * C));
    float* rows = saved.projections ? saved.projections + b * N * L : scratch<kFree>(N * L);
    float* means = saved.attention ? saved.attention + b * N * E : scratch<kOut>(N * E);
    pair_gemm<Order::row_major>(N, L, C / 2, left_of(from), project.right(), {rows, nullptr, L});
    if (k.has_bias) add_bias({rows, L}, N, L, k.bias.data());
    sweep_image(false, k, rows, means, slopes);
    const HalfRows rounded{reinterpret_cast<Half*>(scratch<kFree + 5>(N * E)), E};
    narrow(means, N, E, rounded);
    pair_gemm<Order::row_major>(
        N, C, E / 2, left_of(rounded), output.right(),
        {nullptr, to.data, to.ld, false, shape.residual ? from.data : nullptr, from.ld, out_bias});
    finish(result, to, N, C);
  });
}

void backward_in_pairs(const Block& k, const View& x, const View& grad_z, const BlockSaved& saved,
                       const View& grad_x, const BlockGradients& gradients) {
  const BlockShape& shape = k.shape;
  const int64_t C = k.C, E = k.E, L = k.L, N = k.N, pairs = ceil_divide(N, 2);
  const WeightPairs project_back(k.projection, L, C, false, shape.threads),
      output_back(k.out, C, E, false, shape.threads);
  std::vector<float> slopes;
  WeightSums sums(k, shape.threads);
  over_whole_images(shape.batch, shape.threads, shape.deterministic, [&](int64_t b) {
    float *projection = sums.part(omp_get_thread_num()), *out = projection + L * C, *bias = out + C * E;
    const Image image(x, b, C, shape.space), upstream(grad_z, b, C, shape.space),
        result(grad_x, b, C, shape.space);
    const HalfRows from = half_rows(image, N, C, scratch<kFree + 3>(N * C)),
                   grad = half_rows(upstream, N, C, scratch<kGradZ>(N * C)),
                   to = half_target(result, C, scratch<kFree + 4>(N * C));
    float *grads = scratch<kFree>(N * L), *grad_means = scratch<kFree + 1>(N * E);
    pair_gemm<Order::row_major>(N, E, C / 2, left_of(grad), output_back.right(), {grad_means, nullptr, E});
    sweep_image_back(false, k, saved.projections + b * N * L, grad_means, grads, slopes);
    const HalfRows rounded{reinterpret_cast<Half*>(scratch<kFree + 5>(N * L)), L},
        means{reinterpret_cast<Half*>(scratch<kOut>(N * E)), E};
    narrow(grads, N, L, rounded);
    narrow(saved.attention + b * N * E, N, E, means);
    pair_gemm<Order::row_major>(
        N, C, L / 2, left_of(rounded), project_back.right(),
        {nullptr, to.data, to.ld, false, shape.residual ? grad.data : nullptr, grad.ld});
    finish(result, to, N, C);
    Pair* lefts = reinterpret_cast<Pair*>(scratch<kFree + 6>(pairs * std::max(C, L)));
    float* rights = scratch<kFree + 2>(panels_size(N, std::max(C, E)));
    interleave(rounded, N, L, lefts, L);
    pair_gemm<Order::depth_major>(L, C, pairs, {lefts, L}, pair_panels(from, N, C, rights),
                                  {projection, nullptr, C, true});
    interleave(grad, N, C, lefts, C);
    pair_gemm<Order::depth_major>(C, E, pairs, {lefts, C}, pair_panels(means, N, E, rights),
                                  {out, nullptr, E, true});
    if (k.has_bias) {
      add_columns({grads, L}, N, L, bias);
      add_half_columns(grad, N, C, bias + L);
    }
  });
  sums.store(gradients);
}
#endif

}  // namespace

void concatenation_sweep(const SweepShape& shape, const float* query, const float* key, const float* value,
                         float* out, const float* weight, float* slope) {
  const int64_t N = shape.queries, M = shape.keys, E = shape.channels;
  std::vector<float> slopes;
  over_images(shape.batch, shape.threads, true, [&](int64_t b, bool team) {
    Rising queries, keys;
    Sweep job{shape.scale, column(query + b * N), column(key + b * M), rows_of(value + b * M * E, E)};
    if (out) job.out = {out + b * N * E, E};
    if (weight) {
      job.weight = rows_of(weight + b * N * E, E);
      job.slope = {slope + b * N, 1};
    }
    queries.sort(job.query, N);
    keys.sort(job.key, M);
    shared_sweep(team, job, E, queries, keys, slopes);
  });
}

// Projections have the columns a, b, g: the weights of the pair are multiplied into theta and phi, so D is 1.
void concatenation_forward(const BlockShape& shape, const BlockWeights& weights, const View& x, const View& z,
                           const BlockSaved& saved) {
  const Block k(shape, weights);
#ifdef __AVX512BF16__
  if (pairs_serve(shape, x)) return forward_in_pairs(k, x, z, saved);
#endif
  const int64_t C = k.C, E = k.E, L = k.L, N = k.N;
  Buffer projection_panels, out_panels;
  std::vector<float> shared_rows, shared_means, slopes;
  const Right project = packed(k.projection.data(), C, L, true, projection_panels, shape.threads);
  const Right output = packed(k.out.data(), E, C, true, out_panels, shape.threads);
  over_images(shape.batch, shape.threads, shape.deterministic, [&](int64_t b, bool team) {
    const Image image(x, b, C, shape.space), result(z, b, C, shape.space);
    if (team) {
#pragma omp single
      {
        shared_rows.resize(saved.projections ? 0 : N * L);
        shared_means.resize(saved.attention ? 0 : N * E);
      }
    }
    float* rows = saved.projections ? saved.projections + b * N * L
                  : team            ? shared_rows.data()
                                    : scratch<kFree>(N * L);
    float* means = saved.attention ? saved.attention + b * N * E
                   : team          ? shared_means.data()
                                   : scratch<kOut>(N * E);
    share(team, ceil_divide(N, kRowBlock), [&](int64_t block) {
      const Range r(block, kRowBlock, N);
      const Rows from = image.load(r.first, r.last, scratch<kX>(kRowBlock * C));
      gemm<Order::row_major>(r.count(), L, C, {from.data, from.ld}, project,
                             {rows + r.first * L, L, k.has_bias ? k.bias.data() : nullptr, 0});
    });
    sweep_image(team, k, rows, means, slopes);
    share(team, ceil_divide(N, kRowBlock), [&](int64_t block) {
      const Range r(block, kRowBlock, N);
      const Rows to = result.target(r.first, scratch<kGradZ>(kRowBlock * C));
      Out out{to.data, to.ld, k.has_bias ? k.out_bias.data() : nullptr, 0};
      if (shape.residual) {
        const Rows from = image.load(r.first, r.last, scratch<kX>(kRowBlock * C));
        out.init = from.data;
        out.init_ld = from.ld;
      }
      gemm<Order::row_major>(r.count(), C, E, {means + r.first * E, E}, output, out);
      if (shape.residual && k.has_bias) add_bias(to, r.count(), C, k.out_bias.data());
      result.finish(r.first, r.last, to);
    });
  });
}

void concatenation_backward(const BlockShape& shape, const BlockWeights& weights, const View& x,
                            const View& grad_z, const BlockSaved& saved, const View& grad_x,
                            const BlockGradients& gradients) {
  const Block k(shape, weights);
#ifdef __AVX512BF16__
  if (pairs_serve(shape, x)) return backward_in_pairs(k, x, grad_z, saved, grad_x, gradients);
#endif
  const int64_t C = k.C, E = k.E, L = k.L, N = k.N;
  Buffer projection_panels, out_panels;
  std::vector<float> shared_grads, shared_means, slopes;
  const Right project_back = packed(k.projection.data(), L, C, false, projection_panels, shape.threads);
  const Right output_back = packed(k.out.data(), C, E, false, out_panels, shape.threads);
  WeightSums sums(k, shape.threads);
  over_images(shape.batch, shape.threads, shape.deterministic, [&](int64_t b, bool team) {
    const Image image(x, b, C, shape.space), upstream(grad_z, b, C, shape.space),
        result(grad_x, b, C, shape.space);
    const int thread = omp_get_thread_num();
    float *rows = saved.projections + b * N * L, *means = saved.attention + b * N * E;
    if (team) {
#pragma omp single
      {
        shared_grads.resize(N * L);
        shared_means.resize(N * E);
      }
    }
    float* grads = team ? shared_grads.data() : scratch<kFree>(N * L);
    float* grad_means = team ? shared_means.data() : scratch<kFree + 1>(N * E);
    share(team, ceil_divide(N, kRowBlock), [&](int64_t block) {
      const Range r(block, kRowBlock, N);
      const Rows grad = upstream.load(r.first, r.last, scratch<kGradZ>(kRowBlock * C));
      gemm<Order::row_major>(r.count(), E, C, {grad.data, grad.ld}, output_back,
                             {grad_means + r.first * E, E});
    });
    sweep_image_back(team, k, rows, grad_means, grads, slopes);
    share(team, ceil_divide(N, kRowBlock), [&](int64_t block) {
      const Range r(block, kRowBlock, N);
      const Rows from = image.load(r.first, r.last, scratch<kX>(kRowBlock * C));
      const Rows grad = upstream.load(r.first, r.last, scratch<kGradZ>(kRowBlock * C));
      const Rows here{grads + r.first * L, L};
      sums.add(thread, r.count(), from, grad, {means + r.first * E, E}, here);
      const Rows to = result.target(r.first, scratch<kOut>(kRowBlock * C));
      gemm<Order::row_major>(r.count(), C, L, {here.data, L}, project_back,
                             {to.data, to.ld, shape.residual ? grad.data : nullptr, grad.ld});
      result.finish(r.first, r.last, to);
    });
  });
  sums.store(gradients);
}

}  // namespace rlnas::RLNAS_ISA
