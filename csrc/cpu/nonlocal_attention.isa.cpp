// Softmax non-local attention and the whole softmax block, compiled once an instruction set.
#include "cpu/nonlocal_block.h"

namespace rlnas::RLNAS_ISA {
namespace {

// What a team shares while it works on one image.
struct TeamBuffers {
  std::vector<float> rows, keys;
  std::vector<float*> key_sums;  // one a thread; null where a thread did not start
  explicit TeamBuffers(int threads) : key_sums(threads, nullptr) {}
  void resize(int64_t row_count, int64_t key_count) {
    rows.resize(row_count);
    keys.resize(key_count);
  }
};

// Keys and values of one image as rows, loaded by one thread or by the team.
struct LoadedKeys {
  KeyValue keys;
  LoadedKeys(const AttentionShape& shape, const Image& phi, const Image& g, bool team,
             std::vector<float>& shared_keys, std::vector<float>& shared_values) {
    if (team) {
#pragma omp single
      {
        shared_keys.resize(phi.in_place() ? 0 : shape.keys * shape.inner);
        shared_values.resize(g.in_place() ? 0 : shape.keys * shape.value);
      }
    }
    float* key = team ? shared_keys.data() : scratch<kFree>(shape.keys * shape.inner);
    float* value = team ? shared_values.data() : scratch<kFree + 1>(shape.keys * shape.value);
    share(team, ceil_divide(shape.keys, kRowBlock), [&](int64_t block) {
      const Range r(block, kRowBlock, shape.keys);
      phi.load(r.first, r.last, key + r.first * shape.inner);
      g.load(r.first, r.last, value + r.first * shape.value);
    });
    keys = {phi.in_place() ? phi.in_place_rows(0) : Rows{key, shape.inner},
            g.in_place() ? g.in_place_rows(0) : Rows{value, shape.value}, shape.keys};
  }
};

}  // namespace

void block_forward(const BlockShape& shape, const BlockWeights& weights, const View& x, const View& z,
                   const BlockSaved& saved) {
  if (bf16_block_serves(shape, x)) return bf16_block_forward(shape, weights, x, z, saved);
  const Block k(shape, weights);
  Buffer projection_panels, out_panels;
  const Right project = packed(k.projection.data(), k.C, k.W, true, projection_panels, shape.threads);
  const Right output = packed(k.out.data(), k.E, k.C, true, out_panels, shape.threads);
  const bool kept = saved.terms || (k.N <= kKept && !saved.lse);
  const int64_t size = kept ? kept_tile(k.N) : kForwardTile, ld = kept_lanes(k.N);
  std::vector<float> shared_rows, shared_keys;
  std::vector<uint8_t> shared_winners;
  over_images(shape.batch, shape.threads, shape.deterministic, [&](int64_t b, bool team) {
    const Image image(x, b, k.C, shape.space), result(z, b, k.C, shape.space);
    const int64_t width = k.D + k.E;
    Ahead next, *ahead = kept && !team && b + 1 < shape.batch ? &next : nullptr;
    if (ahead) {
      Image(x, b + 1, k.C, shape.space).ahead(k.N, next);
      if (saved.projections) next.add(saved.projections + (b + 1) * k.N * k.L, k.N * k.L);
      if (saved.terms) next.add(saved.terms + (b + 1) * k.M * ld, k.M * ld);
      if (saved.attention) next.add(saved.attention + (b + 1) * k.N * k.E, k.N * k.E);
      Image(z, b + 1, k.C, shape.space).ahead(k.N, next);
    }
    if (team) {
#pragma omp single
      {
        shared_rows.resize(saved.projections ? 0 : k.N * k.L);
        shared_keys.resize(k.pools() ? k.M * width : 0);
        shared_winners.resize(k.pools() && !saved.winners ? k.M * width : 0);
      }
    }
    float* own_rows = team ? shared_rows.data() : saved.projections ? nullptr : scratch<kFree>(k.N * k.L);
    float* rows = saved.projections ? saved.projections + b * k.N * k.L : own_rows;
    float* pooled = !k.pools() ? nullptr : team ? shared_keys.data() : scratch<kFree + 1>(k.M * width);
    uint8_t* winners = saved.winners        ? saved.winners + b * k.M * width
                       : team || !k.pools() ? shared_winners.data()
                                            : reinterpret_cast<uint8_t*>(scratch<kFree + 2>(k.M * width));
    share(team, ceil_divide(k.N, kRowBlock), [&](int64_t block) {
      const Range r(block, kRowBlock, k.N);
      const Rows from = image.load(r.first, r.last, scratch<kX>(kRowBlock * k.C));
      k.copy_own(from, r.count(), rows + r.first * k.L);
      gemm<Order::row_major>(r.count(), k.W, k.C, {from.data, from.ld}, project,
                             {rows + r.first * k.L + k.Q, k.L, k.has_bias ? k.bias.data() : nullptr, 0},
                             ahead);
    });
    if (k.pools())
      share(team, ceil_divide(k.M, kRowBlock),
            [&](int64_t block) { k.pool_keys(Range(block, kRowBlock, k.M), rows, pooled, winners); });
    const KeyValue keys = k.keys_of(rows, pooled);
    share(team, ceil_divide(k.N, size), [&](int64_t tile) {
      const Range r(tile, size, k.N);
      const Rows attention = saved.attention ? Rows{saved.attention + (b * k.N + r.first) * k.E, k.E}
                                             : Rows{scratch<kOut>(size * k.E), k.E};
      const Rows query{rows + r.first * k.L, k.L};
      float* lse = saved.lse ? saved.lse + b * k.N + r.first : nullptr;
      if (kept) {
        float inverse[kKeptTile];
        const Rows terms = saved.terms ? Rows{saved.terms + b * k.M * ld + r.first, ld}
                                       : Rows{scratch<kLogits>(k.M * size), size};
        attend_kept(query, r.count(), k.D, k.E, keys, attention, terms, lse ? lse : inverse, ahead);
      } else {
        attend(query, r.count(), k.D, k.E, keys, attention, lse);
      }
      const Rows to = result.target(r.first, scratch<kGradZ>(size * k.C));
      Out out{to.data, to.ld, k.has_bias ? k.out_bias.data() : nullptr, 0};
      if (shape.residual) {
        const Rows from = image.load(r.first, r.last, scratch<kX>(kRowBlock * k.C));
        out.init = from.data;
        out.init_ld = from.ld;
      }
      gemm<Order::row_major>(r.count(), k.C, k.E, {attention.data, attention.ld}, output, out, ahead);
      if (shape.residual && k.has_bias) add_bias(to, r.count(), k.C, k.out_bias.data());
      result.finish(r.first, r.last, to);
    });
  });
}

void block_backward(const BlockShape& shape, const BlockWeights& weights, const View& x, const View& grad_z,
                    const BlockSaved& saved, const View& grad_x, const BlockGradients& gradients) {
  if (bf16_block_serves(shape, x))
    return bf16_block_backward(shape, weights, x, grad_z, saved, grad_x, gradients);
  const Block k(shape, weights);
  const int64_t C = k.C, D = k.D, E = k.E, L = k.L, N = k.N, M = k.M, width = D + E;
  const int64_t size = saved.terms ? kept_tile(N) : kBackwardTile, ld = kept_lanes(N);
  Buffer projection_panels, out_panels;
  const Right project_back = packed(k.projection.data(), k.W, C, false, projection_panels, shape.threads);
  const Right output_back = packed(k.out.data(), C, E, false, out_panels, shape.threads);
  WeightSums sums(k, shape.threads);
  TeamBuffers shared(shape.threads);
  const auto image_backward = [&](int64_t b, bool team) {
    const Image image(x, b, C, shape.space), grad_out_image(grad_z, b, C, shape.space);
    const Image result(grad_x, b, C, shape.space);
    const int thread = omp_get_thread_num();
    Ahead next, *ahead = saved.terms && !team && b + 1 < shape.batch ? &next : nullptr;
    if (ahead) {
      Image(grad_z, b + 1, C, shape.space).ahead(N, next);
      next.add(saved.projections + (b + 1) * N * L, N * L);
      next.add(saved.terms + (b + 1) * M * ld, M * ld);
      next.add(saved.attention + (b + 1) * N * E, N * E);
      Image(x, b + 1, C, shape.space).ahead(N, next);
      Image(grad_x, b + 1, C, shape.space).ahead(N, next);
    }
    float* rows = saved.projections + b * N * L;
    const uint8_t* winners = saved.winners ? saved.winners + b * M * width : nullptr;
    if (team) {
#pragma omp single
      shared.resize(N * L, k.pools() ? M * width : 0);
    }
    float* grads = team ? shared.rows.data() : scratch<kFree>(N * L);
    float* pooled = !k.pools() ? nullptr : team ? shared.keys.data() : scratch<kFree + 1>(M * width);
    const bool apart = team || k.pools() || k.Q;  // gradients of keys are summed beside those of the rows
    float* key_sums = apart ? shared.key_sums[thread] = scratch<kFree + 2>(M * width) : nullptr;
    if (apart) std::memset(key_sums, 0, sizeof(float) * M * width);
    if (k.pools())
      share(team, M, [&](int64_t m) {
        for (int64_t c = 0; c < width; c++)
          pooled[m * width + c] = rows[k.position(m, winners[m * width + c]) * L + k.K + c];
      });
    const KeyValue keys = k.keys_of(rows, pooled);
    const KeyValue grad_keys = apart ? KeyValue{{key_sums, width}, {key_sums + D, width}, M}
                                     : KeyValue{{grads + D, L}, {grads + 2 * D, L}, N};
    share(team, ceil_divide(N, size), [&](int64_t tile) {
      const Range r(tile, size, N);
      const Rows grad = grad_out_image.load(r.first, r.last, scratch<kGradZ>(kRowBlock * C));
      const Rows grad_attention{scratch<kOut>(size * E), E};
      const float* lse = saved.lse + b * N + r.first;
      const Rows query{rows + r.first * L, L}, grad_query{grads + r.first * L, L};
      gemm<Order::row_major>(r.count(), E, C, {grad.data, grad.ld}, output_back,
                             {grad_attention.data, E, nullptr, 0, saved.terms ? lse : nullptr}, ahead);
      if (saved.terms)
        attend_kept_backward(query, grad_attention, r.count(), D, E, keys,
                             {saved.terms + b * M * ld + r.first, ld}, grad_query, grad_keys,
                             !apart && tile == 0, ahead);
      else
        attend_backward(query, {saved.attention + (b * N + r.first) * E, E}, grad_attention, lse, r.count(),
                        D, E, keys, grad_query, grad_keys, !apart && tile == 0);
    });
    if (apart) {
      share(team, ceil_divide(N, kRowBlock), [&](int64_t block) {
        const Range r(block, kRowBlock, N);
        for (int64_t n = r.first; n < r.last; n++) std::memset(grads + n * L + D, 0, sizeof(float) * (L - D));
      });
      const std::vector<float*> parts = team ? shared.key_sums : std::vector<float*>{key_sums};
      share(team, M, [&](int64_t m) {
        for (const float* part : parts) {
          if (!part) continue;
          for (int64_t c = 0; c < width; c++)
            grads[k.position(m, winners ? winners[m * width + c] : 0) * L + k.K + c] += part[m * width + c];
        }
      });
    }
    share(team, ceil_divide(N, kRowBlock), [&](int64_t block) {
      const Range r(block, kRowBlock, N);
      const Rows from = image.load(r.first, r.last, scratch<kX>(kRowBlock * C));
      const Rows grad = grad_out_image.load(r.first, r.last, scratch<kGradZ>(kRowBlock * C));
      const Rows attention{saved.attention + (b * N + r.first) * E, E}, grad_rows{grads + r.first * L, L};
      sums.add(thread, r.count(), from, grad, attention, grad_rows, ahead);
      const Rows to = result.target(r.first, scratch<kOut>(kRowBlock * std::max(C, E)));
      Rows init{shape.residual ? grad.data : nullptr, grad.ld};
      if (k.Q) {  // what came to x itself
        if (shape.residual) add_rows(grad, r.count(), C, grad_rows);
        init = grad_rows;
      }
      gemm<Order::row_major>(r.count(), C, k.W, {grad_rows.data + k.Q, L}, project_back,
                             {to.data, to.ld, init.data, init.ld}, ahead);
      result.finish(r.first, r.last, to);
    });
  };
  over_images(shape.batch, shape.threads, shape.deterministic, image_backward);
  sums.store(gradients);
}

void attention_forward(const AttentionShape& shape, const View& theta, const View& phi, const View& g,
                       const View& y, float* lse) {
  const int64_t queries[3] = {1, 1, shape.queries}, keys[3] = {1, 1, shape.keys};
  std::vector<float> shared_keys, shared_values;
  over_images(shape.batch, shape.threads, shape.deterministic, [&](int64_t b, bool team) {
    const Image query(theta, b, shape.inner, queries), out(y, b, shape.value, queries);
    const LoadedKeys loaded(shape, Image(phi, b, shape.inner, keys), Image(g, b, shape.value, keys), team,
                            shared_keys, shared_values);
    share(team, ceil_divide(shape.queries, kForwardTile), [&](int64_t tile) {
      const Range r(tile, kForwardTile, shape.queries);
      const Rows to = out.target(r.first, scratch<kOut>(kForwardTile * shape.value));
      attend(query.load(r.first, r.last, scratch<kX>(kForwardTile * shape.inner)), r.count(), shape.inner,
             shape.value, loaded.keys, to, lse ? lse + b * shape.queries + r.first : nullptr);
      out.finish(r.first, r.last, to);
    });
  });
}

void attention_backward(const AttentionShape& shape, const View& theta, const View& phi, const View& g,
                        const View& y, const float* lse, const View& grad_y, const View& grad_theta,
                        const View& grad_phi, const View& grad_g) {
  const int64_t queries[3] = {1, 1, shape.queries}, spots[3] = {1, 1, shape.keys};
  const int64_t D = shape.inner, E = shape.value, M = shape.keys, width = D + E;
  std::vector<float> shared_keys, shared_values;
  TeamBuffers shared(shape.threads);
  over_images(shape.batch, shape.threads, shape.deterministic, [&](int64_t b, bool team) {
    const Image query(theta, b, D, queries), out(y, b, E, queries), grad_out(grad_y, b, E, queries);
    const Image grad_query(grad_theta, b, D, queries), grad_key(grad_phi, b, D, spots),
        grad_value(grad_g, b, E, spots);
    const LoadedKeys loaded(shape, Image(phi, b, D, spots), Image(g, b, E, spots), team, shared_keys,
                            shared_values);
    float* sums = shared.key_sums[omp_get_thread_num()] = scratch<kFree + 2>(M * width);
    std::memset(sums, 0, sizeof(float) * M * width);
    share(team, ceil_divide(shape.queries, kBackwardTile), [&](int64_t tile) {
      const Range r(tile, kBackwardTile, shape.queries);
      const Rows to = grad_query.target(r.first, scratch<kFree + 3>(kBackwardTile * D));
      attend_backward(query.load(r.first, r.last, scratch<kX>(kBackwardTile * D)),
                      out.load(r.first, r.last, scratch<kOut>(kBackwardTile * E)),
                      grad_out.load(r.first, r.last, scratch<kGradZ>(kBackwardTile * E)),
                      lse + b * shape.queries + r.first, r.count(), D, E, loaded.keys, to,
                      {{sums, width}, {sums + D, width}, M}, false);
      grad_query.finish(r.first, r.last, to);
    });
    const std::vector<float*> parts = team ? shared.key_sums : std::vector<float*>{sums};
    share(team, ceil_divide(M, kRowBlock), [&](int64_t block) {
      const Range r(block, kRowBlock, M);
      const Rows key = grad_key.target(r.first, scratch<kX>(kRowBlock * D));
      const Rows value = grad_value.target(r.first, scratch<kGradZ>(kRowBlock * E));
      for (int64_t m = r.first; m < r.last; m++) {
        std::memset(key.at(m - r.first), 0, sizeof(float) * D);
        std::memset(value.at(m - r.first), 0, sizeof(float) * E);
        for (const float* part : parts) {
          if (!part) continue;
          for (int64_t c = 0; c < D; c++) key.at(m - r.first)[c] += part[m * width + c];
          for (int64_t c = 0; c < E; c++) value.at(m - r.first)[c] += part[m * width + D + c];
        }
      }
      grad_key.finish(r.first, r.last, key);
      grad_value.finish(r.first, r.last, value);
    });
  });
}

}  // namespace rlnas::RLNAS_ISA
