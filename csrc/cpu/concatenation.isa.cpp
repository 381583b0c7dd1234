// Concatenation attention and its whole block, compiled once an instruction set.
#include "cpu/concatenation.h"

#include "cpu/concatenation_core.h"
#include "cpu/nonlocal_block.h"

namespace rlnas::RLNAS_ISA {
namespace {

constexpr int64_t kChunk = 32;  // channels of one sweep where a team shares an image

// One sweep, whose channels a team shares; each chunk then has its own slopes, added up in order.
void shared_sweep(bool team, const Sweep& job, int64_t channels, const Rising& queries, const Rising& keys,
                  std::vector<float>& slopes) {
  if (!team) return sweep(job, queries, keys, 0, channels);
  const int64_t chunks = blocks_of(channels, kChunk), count = queries.count();
#pragma omp single
  slopes.resize(job.weight.data ? chunks * count : 0);
  share(true, chunks, [&](int64_t chunk) {
    const Range r(chunk, kChunk, channels);
    Sweep part = job;
    if (part.weight.data) part.slope = {slopes.data() + chunk * count, 1};
    sweep(part, queries, keys, r.first, r.last);
  });
  if (job.weight.data)
    share(true, blocks_of(count, kRowBlock), [&](int64_t block) {
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
  const int64_t C = k.C, E = k.E, L = k.L, N = k.N;
  std::vector<float> projection_panels, out_panels, shared_rows, shared_means, slopes;
  const Right project = packed(k.projection.data(), C, L, true, projection_panels);
  const Right output = packed(k.out.data(), E, C, true, out_panels);
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
    share(team, blocks_of(N, kRowBlock), [&](int64_t block) {
      const Range r(block, kRowBlock, N);
      const Rows from = image.load(r.first, r.last, scratch<kX>(kRowBlock * C));
      gemm<Order::row_major>(r.count(), L, C, {from.data, from.ld}, project,
                             {rows + r.first * L, L, k.has_bias ? k.bias.data() : nullptr, 0});
    });
    static thread_local Rising queries, keys;
    queries.sort({rows, L}, N);
    keys.sort({rows + 1, L}, N);
    Sweep job{1.0 / static_cast<double>(N), {rows, L}, {rows + 1, L}, {rows + 2, L}};
    job.out = {means, E};
    shared_sweep(team, job, E, queries, keys, slopes);
    share(team, blocks_of(N, kRowBlock), [&](int64_t block) {
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
  const int64_t C = k.C, E = k.E, L = k.L, N = k.N;
  std::vector<float> projection_panels, out_panels, shared_grads, shared_means, slopes;
  const Right project_back = packed(k.projection.data(), L, C, false, projection_panels);
  const Right output_back = packed(k.out.data(), C, E, false, out_panels);
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
    share(team, blocks_of(N, kRowBlock), [&](int64_t block) {
      const Range r(block, kRowBlock, N);
      const Rows grad = upstream.load(r.first, r.last, scratch<kGradZ>(kRowBlock * C));
      gemm<Order::row_major>(r.count(), E, C, {grad.data, grad.ld}, output_back,
                             {grad_means + r.first * E, E});
    });
    static thread_local Rising queries, keys;
    queries.sort({rows, L}, N);
    keys.sort({rows + 1, L}, N);
    const double scale = 1.0 / static_cast<double>(N);
    // Queries and keys change places for the gradients of g and b.
    Sweep to_keys{scale,          {rows + 1, L}, {rows, L},     {grad_means, E},
                  {grads + 2, L}, {rows + 2, L}, {grads + 1, L}};
    Sweep to_queries{scale,        {rows, L},       {rows + 1, L}, {rows + 2, L},
                     {nullptr, 0}, {grad_means, E}, {grads, L}};
    shared_sweep(team, to_keys, E, keys, queries, slopes);
    shared_sweep(team, to_queries, E, queries, keys, slopes);
    share(team, blocks_of(N, kRowBlock), [&](int64_t block) {
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
