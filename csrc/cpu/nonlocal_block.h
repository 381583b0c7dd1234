// What the fused blocks share: work over images, weights in float32, pooled keys, gradients of the weights.
//
// One parallel region a call.  With enough images a thread takes whole images, whose projections then stay in
// its cache; otherwise the team shares the tiles of one image after another, so that a batch of one is
// parallel too. Included by *.isa.cpp only.
#pragma once

#include <omp.h>

#include <atomic>
#include <memory>
#include <vector>

#include "cpu/nonlocal_core.h"

namespace rlnas::RLNAS_ISA {
namespace {

constexpr int64_t kRowBlock = 128;  // positions whose rows stay in the second-level cache through a product

// A loop over tasks: alone, or shared by the team, which then meets at its end.
template <class F>
void share(bool team, int64_t count, F task) {
  if (!team) {
    for (int64_t i = 0; i < count; i++) task(i);
    return;
  }
#pragma omp for schedule(runtime)
  for (int64_t i = 0; i < count; i++) task(i);
}

// The schedule of `share` as long as this lives.  Static ones make sums over threads reproducible.
class Schedule {
 public:
  explicit Schedule(bool deterministic) {
    omp_get_schedule(&kind_, &chunk_);
    omp_set_schedule(deterministic ? omp_sched_static : omp_sched_dynamic, 1);
  }
  ~Schedule() { omp_set_schedule(kind_, chunk_); }
  Schedule(const Schedule&) = delete;
  Schedule& operator=(const Schedule&) = delete;

 private:
  omp_sched_t kind_;
  int chunk_;
};

// Hands images to threads: to each the same range in every call, so that a backward finds in its cache what
// the forward left there, and images in a row, which the hardware fetches ahead; then what others have left.
class ImageShares {
 public:
  ImageShares(int64_t count, int threads, bool deterministic)
      : count_(count), deterministic_(deterministic), next_(threads) {
    for (int i = 0; i < threads; i++) next_[i] = first(i);
  }

  // Called by every thread of a team of any size.
  template <class F>
  void run(F task) {
    const int shares = static_cast<int>(next_.size());
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    for (int i = 0; i < shares; i++) {
      const int share = (thread + i) % shares;
      if (deterministic_ && share % team != thread) continue;
      const int64_t end = first(share + 1);
      for (int64_t b; (b = next_[share].fetch_add(1)) < end;) task(b);
    }
  }

 private:
  int64_t first(int share) const { return count_ * share / static_cast<int64_t>(next_.size()); }
  int64_t count_;
  bool deterministic_;
  std::vector<std::atomic<int64_t>> next_;
};

// Runs task(image) for every image, each on one thread.
template <class F>
void over_whole_images(int64_t batch, int threads, bool deterministic, F task) {
  ImageShares shares(batch, threads, deterministic);
#pragma omp parallel num_threads(threads)
  shares.run(task);
}

// Runs task(image, team) for every image.
template <class F>
void over_images(int64_t batch, int threads, bool deterministic, F task) {
  if (threads == 1 || batch % threads == 0 || batch >= 4 * threads)
    return over_whole_images(batch, threads, deterministic, [&](int64_t b) { task(b, false); });
  const Schedule schedule(deterministic);
#pragma omp parallel num_threads(threads)
  for (int64_t b = 0; b < batch; b++) task(b, true);
}

struct Range {
  int64_t first, last;
  Range(int64_t block, int64_t size, int64_t count)
      : first(block * size), last(std::min(first + size, count)) {}
  int64_t count() const { return last - first; }
};

// Sums the columns of rows [count] onto total, in parts: see kChain.
void add_columns(Rows rows, int64_t count, int64_t columns, float* total) {
  for (int64_t c = 0; c < columns; c += kWidth) {
    const int64_t some = std::min<int64_t>(kWidth, columns - c);
    Vec sum = load_some(total + c, some);
    for (int64_t n = 0; n < count;) {
      Vec part = {};
      for (const int64_t end = std::min(count, n + 16); n < end; n++) part += load_some(rows.at(n) + c, some);
      sum += part;
    }
    store_some(total + c, sum, some);
  }
}

[[maybe_unused]] void add_rows(Rows from, int64_t count, int64_t columns, Rows to) {
  for (int64_t n = 0; n < count; n++)
    for (int64_t c = 0; c < columns; c++) to.at(n)[c] += from.at(n)[c];
}

[[maybe_unused]] void add_bias(Rows rows, int64_t count, int64_t columns, const float* bias) {
  for (int64_t n = 0; n < count; n++)
    for (int64_t c = 0; c < columns; c++) rows.at(n)[c] += bias[c];
}

// Floats on a 64-byte border that are written before they are read: nobody fills them with zeros first.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size)
      : data_(static_cast<float*>(std::aligned_alloc(64, ceil_divide(size, 16) * 64))), size_(size) {
    if (!data_ && size > 0) throw std::bad_alloc();
  }
  float* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  float& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

// Runs task(i) for i < count, on all threads if what they move is worth it; a team of one is not free either.
template <class F>
void spread(int threads, int64_t count, int64_t floats, F task) {
  if (floats <= 65536) {
    for (int64_t i = 0; i < count; i++) task(i);
    return;
  }
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < count; i++) task(i);
}

constexpr int64_t kPart = 4096;  // floats of one task of `spread`

// A dense matrix [rows][columns] of any dtype as float32.
void to_float(DType dtype, const void* from, int64_t count, float* to, int threads = 1) {
  spread(threads, ceil_divide(count, kPart), count, [&](int64_t block) {
    const Range r(block, kPart, count);
    with_dtype(dtype, [&](auto type) {
      using D = decltype(type);
      const auto* typed = static_cast<const typename D::Stored*>(from);
      for (int64_t i = r.first; i < r.last; i++) to[i] = typed ? D::read(typed[i]) : 0.0f;
    });
  });
}

// Panels of a right operand [depth][columns] or, transposed, of [columns][depth].
[[maybe_unused]] Right packed(const float* from, int64_t depth, int64_t columns, bool transposed,
                              Buffer& buffer, int threads) {
  const int64_t stride = kPanel * depth, panels = ceil_divide(columns, kPanel);
  buffer = Buffer(panels * stride);
  spread(threads, panels, buffer.size(), [&](int64_t index) {
    const int64_t n = index * kPanel, some = std::min<int64_t>(kPanel, columns - n);
    float* panel = buffer.data() + index * stride;
    if (some < kPanel) std::memset(panel, 0, sizeof(float) * stride);
    if (transposed)
      transpose(from + n * depth, depth, some, depth, panel, kPanel);
    else
      for (int64_t k = 0; k < depth; k++)
        std::memcpy(panel + k * kPanel, from + k * columns + n, sizeof(float) * some);
  });
  return {buffer.data(), kPanel, stride};
}

// float32 as a dense tensor of any dtype, which may be absent.
void from_float(DType dtype, const float* from, int64_t count, void* to, int threads = 1) {
  if (!to) return;
  spread(threads, ceil_divide(count, kPart), count, [&](int64_t block) {
    const Range r(block, kPart, count);
    with_dtype(dtype, [&](auto type) {
      using D = decltype(type);
      auto* typed = static_cast<typename D::Stored*>(to);
      for (int64_t i = r.first; i < r.last; i++) typed[i] = D::write(from[i]);
    });
  });
}

// The block's sizes, and its weights in float32: projection [W][C] of theta, phi and g in turn, and out
// [C][E]; a pair's weights are multiplied into theta and phi, so that D is 1.  An image's rows have L
// columns: Q that are x itself, then W projected ones; the keys, followed by the values, start at column K.
struct Block {
  const BlockShape& shape;
  const BlockWeights& given;
  int64_t C, D, E, Q, K, L, W, N, M, pooled[3];
  bool has_bias;
  std::vector<int64_t> offsets;  // of the elements of a window from its first: divisions for each took longer
  Buffer projection, bias, out, out_bias;

  Block(const BlockShape& s, const BlockWeights& w)
      : shape(s),
        given(w),
        C(s.channels),
        D(w.pair ? 1 : s.inner),
        E(s.value),
        Q(w.theta ? 0 : C),
        K(w.theta ? D : 0),
        L(K + D + E),
        W(L - Q),
        N(1),
        M(1),
        has_bias(w.theta_bias || w.phi_bias || w.g_bias || w.out_bias) {
    for (int i = 0; i < 3; i++) {
      pooled[i] = s.space[i] / s.pool[i];
      N *= s.space[i];
      M *= pooled[i];
    }
    for (int64_t t = 0; t < s.pool[0]; t++)
      for (int64_t h = 0; h < s.pool[1]; h++)
        for (int64_t i = 0; i < s.pool[2]; i++) offsets.push_back((t * s.space[1] + h) * s.space[2] + i);
    projection = Buffer(W * C);
    bias = Buffer(W);
    out = Buffer(C * E);
    out_bias = Buffer(C);
    if (w.pair) {
      join(w.theta, w.theta_bias, 0);
      join(w.phi, w.phi_bias, 1);
    } else if (w.theta) {
      to_float(w.dtype, w.theta, D * C, projection.data(), s.threads);
      to_float(w.dtype, w.phi, D * C, projection.data() + D * C, s.threads);
      to_float(w.dtype, w.theta_bias, D, bias.data());
      to_float(w.dtype, w.phi_bias, D, bias.data() + D);
    }
    to_float(w.dtype, w.g, E * C, projection.data() + (W - E) * C, s.threads);
    to_float(w.dtype, w.g_bias, E, bias.data() + W - E);
    to_float(w.dtype, w.out, C * E, out.data(), s.threads);
    to_float(w.dtype, w.out_bias, C, out_bias.data());
  }

  // Half of the pair's weights: of theta (0) or of phi (1).
  std::vector<float> half_pair(int64_t half) const {
    std::vector<float> both(2 * shape.inner);
    to_float(given.dtype, given.pair, both.size(), both.data());
    return {both.begin() + half * shape.inner, both.begin() + (half + 1) * shape.inner};
  }

  bool pools() const { return M != N; }

  // Position of element `place` of the window of pooled key m.
  int64_t position(int64_t m, int64_t place) const { return corner(m) + offsets[place]; }
  int64_t corner(int64_t m) const {
    const auto &p = shape.pool, &s = shape.space;
    const int64_t w = m % pooled[2] * p[2], h = m / pooled[2] % pooled[1] * p[1];
    return (m / pooled[2] / pooled[1] * p[0] * s[1] + h) * s[2] + w;
  }
  int64_t window() const { return shape.pool[0] * shape.pool[1] * shape.pool[2]; }

  // Pooled phi and g of keys [first, last) and where in the window each came from; the first of equals, NaN
  // wins.
  void pool_keys(Range keys, const float* rows, float* to, uint8_t* winners) const {
    const int64_t width = D + E;
    for (int64_t m = keys.first; m < keys.last; m++) {
      float* best = to + m * width;
      uint8_t* winner = winners + m * width;
      std::memcpy(best, rows + position(m, 0) * L + K, sizeof(float) * width);
      std::memset(winner, 0, width);
      for (int64_t place = 1; place < window(); place++) {
        const float* from = rows + position(m, place) * L + K;
        for (int64_t c = 0; c < width; c++) {
          const bool wins = from[c] > best[c] || from[c] != from[c];
          best[c] = wins ? from[c] : best[c];
          winner[c] = wins ? static_cast<uint8_t>(place) : winner[c];
        }
      }
    }
  }

  KeyValue keys_of(float* rows, float* pooled_rows) const {
    return pools() ? KeyValue{{pooled_rows, D + E}, {pooled_rows + D, D + E}, M}
                   : KeyValue{{rows + K, L}, {rows + K + D, L}, N};
  }

  // The columns of rows that are x itself.
  void copy_own(Rows x, int64_t count, float* rows) const {
    if (Q == 0) return;
    for (int64_t n = 0; n < count; n++) std::memcpy(rows + n * L, x.at(n), sizeof(float) * Q);
  }

 private:
  // Two linear maps in a row are one.
  void join(const void* weight, const void* weight_bias, int64_t half) {
    const std::vector<float> pair = half_pair(half);
    std::vector<float> rows(shape.inner * C), offsets(shape.inner);
    to_float(given.dtype, weight, rows.size(), rows.data());
    to_float(given.dtype, weight_bias, offsets.size(), offsets.data());
    std::vector<double> total(C + 1, 0.0);  // rounded once, because every position multiplies its error
    for (int64_t d = 0; d < shape.inner; d++) {
      const double weight = pair[d];
      for (int64_t c = 0; c < C; c++) total[c] += weight * rows[d * C + c];
      total[C] += weight * offsets[d];
    }
    for (int64_t c = 0; c < C; c++) projection[half * C + c] = static_cast<float>(total[c]);
    bias[half] = static_cast<float>(total[C]);
  }
};

// Gradients of the weights: one sum a thread, added up in the order of the threads.  What a thread adds in a
// row is bounded, as in kChain: a sum over thousands of images would lose to rounding.
class WeightSums {
 public:
  WeightSums(const Block& block, int threads) : k_(block), parts_(threads) {}

  // One thread's sums to add to: projection [W][C], out [C][E], bias [W], out bias [C].
  float* part(int thread) {
    Part& part = parts_[thread];
    if (part.asked++ % kAsked == 0) {
      if (!part.total.size())
        std::swap(part.sums, part.total);
      else
        add_range(part.sums.data(), {0, size(), size()}, part.total.data());
      if (!part.sums.size()) part.sums = Buffer(size());
      std::memset(part.sums.data(), 0, sizeof(float) * size());
    }
    return part.sums.data();
  }
  float* out(int thread) { return part(thread) + k_.W * k_.C; }

  // Adds the share of some positions; without `attention` that of W_z is left to the caller.
  void add(int thread, int64_t count, Rows x, Rows grad_z, Rows attention, Rows grads,
           Ahead* ahead = nullptr) {
    float *projection = part(thread), *out = projection + k_.W * k_.C, *bias = out + k_.C * k_.E;
    const Rows projected{grads.data + k_.Q, grads.ld};
    gemm<Order::depth_major>(k_.W, k_.C, count, {projected.data, projected.ld}, {x.data, x.ld},
                             {projection, k_.C, projection, k_.C}, ahead);
    if (attention.data)
      gemm<Order::depth_major>(k_.C, k_.E, count, {grad_z.data, grad_z.ld}, {attention.data, attention.ld},
                               {out, k_.E, out, k_.E}, ahead);
    if (!k_.has_bias) return;
    add_columns(projected, count, k_.W, bias);
    add_columns(grad_z, count, k_.C, bias + k_.W);
  }

  void store(const BlockGradients& to) {
    const int threads = static_cast<int>(parts_.size());
    float* total = part(0);
    spread(threads, ceil_divide(size(), kPart), size(), [&](int64_t block) {
      const Range r(block, kPart, size());
      for (const Part& part : parts_)
        for (const Buffer* each : {&part.sums, &part.total})
          if (each->size() && each->data() != total) add_range(each->data(), r, total);
    });
    const DType dtype = k_.given.dtype;
    const float* from = total;
    const auto take = [&](void* target, int64_t count) {
      from_float(dtype, from, count, target, threads);
      from += count;
    };
    if (k_.given.pair) {
      split(to);
      from += 2 * k_.C;
    } else if (!k_.Q) {
      take(to.theta, k_.D * k_.C);
      take(to.phi, k_.D * k_.C);
    }
    take(to.g, k_.E * k_.C);
    take(to.out, k_.C * k_.E);
    if (k_.given.pair) {
      from += 2;
    } else if (!k_.Q) {
      take(to.theta_bias, k_.D);
      take(to.phi_bias, k_.D);
    }
    take(to.g_bias, k_.E);
    take(to.out_bias, k_.C);
  }

 private:
  // Gradients of the joined row and its bias as those of the pair, theta and phi.
  void split(const BlockGradients& to) {
    const BlockWeights& given = k_.given;
    const int64_t C = k_.C, D = k_.shape.inner;
    std::vector<float> grad(D * C), grad_bias(D), grad_pair(2 * D), weight(D * C), weight_bias(D);
    for (int64_t half = 0; half < 2; half++) {
      const std::vector<float> pair = k_.half_pair(half);
      const float* row = parts_[0].sums.data() + half * C;
      const float offset = parts_[0].sums[k_.W * C + C * k_.E + half];
      to_float(given.dtype, half ? given.phi : given.theta, D * C, weight.data());
      to_float(given.dtype, half ? given.phi_bias : given.theta_bias, D, weight_bias.data());
      for (int64_t d = 0; d < D; d++) {
        double total = static_cast<double>(weight_bias[d]) * offset;
        for (int64_t c = 0; c < C; c++) {
          grad[d * C + c] = pair[d] * row[c];
          total += static_cast<double>(weight[d * C + c]) * row[c];
        }
        grad_bias[d] = pair[d] * offset;
        grad_pair[half * D + d] = static_cast<float>(total);
      }
      from_float(given.dtype, grad.data(), D * C, half ? to.phi : to.theta);
      from_float(given.dtype, grad_bias.data(), D, half ? to.phi_bias : to.theta_bias);
    }
    from_float(given.dtype, grad_pair.data(), 2 * D, to.pair);
  }

  struct Part {
    Buffer sums, total;
    int64_t asked = 0;
  };
  static constexpr int64_t kAsked = 64;  // times that a sum is handed out before it goes to the total

  static void add_range(const float* from, Range r, float* to) {
    for (int64_t i = r.first; i < r.last; i++) to[i] += from[i];
  }
  int64_t size() const { return k_.W * k_.C + k_.C * k_.E + k_.W + k_.C; }
  const Block& k_;
  std::vector<Part> parts_;
};

}  // namespace
}  // namespace rlnas::RLNAS_ISA
