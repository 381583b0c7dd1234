// Products of compressed rows with panels of the transposed batch.
#include "cpu/masked_matmul_kernel.h"
#include "cpu/scratch.h"

namespace rlnas::RLNAS_ISA {
namespace {

constexpr int kRowFlush = 32;  // nonzeros between two departures of the partial sums from their registers

// Batches are cut into panels of V vectors, transposed, so that one nonzero meets V * kLanes examples.
int panel_vectors(int64_t in) {
  constexpr int64_t kCacheFloats = int64_t{1} << 17;  // half of a 1 MiB second-level cache
  const int64_t fit = kCacheFloats / std::max<int64_t>(1, in * kLanes);
  return fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

template <int V>
size_t panel_floats(const Matrix& x) {
  return static_cast<size_t>((x.rows + V * kLanes - 1) / (V * kLanes) * V * kLanes * x.cols);
}

// Whether panels go past the caches (see kSharedFloats): where vectors are whole lines.
bool written_past(int64_t floats, const float* panels, int threads) {
  return kLanes >= 16 && threads > 1 && floats > kSharedFloats &&
         reinterpret_cast<uintptr_t>(panels) % sizeof(Vector) == 0;
}

template <class T>
void transpose_panel(const Matrix& x, int64_t first, int vectors, int64_t k0, int64_t k1,
                     const int32_t* permutation, bool past, float* panel) {
  const T* data = static_cast<const T*>(x.data);
  alignas(64) float stage[kLanes];
  for (int v = 0; v < vectors; ++v)
    for (int64_t k = k0; k < k1; k += kLanes) {
      const int steps = static_cast<int>(std::min<int64_t>(kLanes, k1 - k));
      Vector r[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t b = first + v * kLanes + i;
        r[i] = Vector{};
        if (b >= x.rows) continue;
        const T* row = data + b * x.stride;
        if constexpr (std::is_same_v<T, float>)
          if (!permutation && steps == kLanes) {
            r[i] = load(row + k);
            continue;
          }
        for (int j = 0; j < kLanes; ++j)
          stage[j] = j < steps ? to_float(row[permutation ? permutation[k + j] : k + j]) : 0.0f;
        r[i] = load(stage);
      }
      transpose(r);
      for (int j = 0; j < steps; ++j) {
        float* const place = panel + ((k + j) * vectors + v) * kLanes;
        past ? store_past(place, r[j]) : store(place, r[j]);
      }
    }
}

template <int V>
inline void multiply_row(const Rows& rows, int64_t n, const float* panel, float* sum) {
  Vector total[V] = {};
  const int32_t end = rows.start[n + 1];
  for (int32_t t = rows.start[n]; t < end;) {
    const int32_t stop = std::min(end, t + kRowFlush);
    Vector even[V] = {}, odd[V] = {};  // two chains hide the latency of the additions
    for (; t + 1 < stop; t += 2) {
      const float* a = panel + static_cast<int64_t>(rows.indices[t]) * V * kLanes;
      const float* b = panel + static_cast<int64_t>(rows.indices[t + 1]) * V * kLanes;
      const Vector wa = splat(rows.values[t]), wb = splat(rows.values[t + 1]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        even[v] += wa * load(a + v * kLanes);
        odd[v] += wb * load(b + v * kLanes);
      }
    }
    if (t < stop) {
      const float* a = panel + static_cast<int64_t>(rows.indices[t]) * V * kLanes;
      const Vector wa = splat(rows.values[t++]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) even[v] += wa * load(a + v * kLanes);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) total[v] += even[v] + odd[v];
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(sum + v * kLanes, total[v]);
}

template <int V, class T>
void multiply_chunk(const Rows& rows, const float* panel, int64_t first, int64_t batch, int64_t n0,
                    int64_t n1, const Output& y, int64_t out) {
  alignas(64) float sum[kLanes * V * kLanes], back[kLanes];
  const int examples = static_cast<int>(std::min<int64_t>(V * kLanes, batch - first));
  for (int64_t n = n0; n < n1; n += kLanes) {
    const int columns = static_cast<int>(std::min<int64_t>(kLanes, n1 - n));
    expect_block<T>(first, examples, n, columns, y, out);
    for (int i = 0; i < columns; ++i) multiply_row<V>(rows, n + i, panel, sum + i * V * kLanes);
    for (int v = 0; v < V; ++v) {
      Vector r[kLanes];
      for (int i = 0; i < kLanes; ++i) r[i] = i < columns ? load(sum + (i * V + v) * kLanes) : Vector{};
      transpose(r);
      for (int j = 0; j < kLanes; ++j) {
        const int64_t b = first + v * kLanes + j;
        if (b >= batch) break;
        store(back, r[j]);
        write_block<T>(back, kLanes, b, 1, n, columns, y, out);
      }
    }
  }
}

// The sums of vectors first .. first + 2 * Half, one a lane: pairs are folded into each other, which takes
// half as many shuffles as a transpose and few registers.
template <int Half, class F>
inline __attribute__((always_inline)) Vector fold(const F& vector, int first) {
  if constexpr (Half == 0) {
    return vector(first);
  } else {
    const Vector a = fold<Half / 2>(vector, first);
    const Vector b = fold<Half / 2>(vector, first + Half);
    IntVector low, high;
    for (int i = 0; i < kLanes; ++i) {
      low[i] = i & Half ? kLanes + (i ^ Half) : i;
      high[i] = i & Half ? kLanes + i : (i ^ Half);
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  }
}

// Nonzeros of one row times what was picked from x for them, spread over the lanes.
inline Vector products(const float* values, const float* picked, int64_t count) {
  Vector acc = {};
#if defined(__AVX512F__)
  for (; count > 0; values += kLanes, picked += kLanes, count -= kLanes) {
    const __mmask16 valid = static_cast<__mmask16>(count >= kLanes ? 0xffff : (1u << count) - 1);
    acc += _mm512_maskz_loadu_ps(valid, values) * _mm512_maskz_loadu_ps(valid, picked);
  }
#else
  int64_t t = 0;
  for (; t + kLanes <= count; t += kLanes) acc += load(values + t) * load(picked + t);
  for (int j = 0; t < count; ++t, ++j) acc[j] += values[t] * picked[t];
#endif
  return acc;
}

// Fewer examples than lanes: lanes take nonzeros instead, and are summed for as many rows as there are lanes.
// x is picked for all of these rows first, one element at a time, which gather instructions do not beat
// (98 % of 512 x 512: 2.5 us; gathering within each row 4.8, row by row without vectors 3.2).
template <class T>
void multiply_few(const Matrix& x, int64_t out, const Rows& rows, const int32_t* permutation, const Output& y,
                  int threads) {
  const T* data = static_cast<const T*>(x.data);
  const bool in_place = std::is_same_v<T, float> && !permutation;
  float* const room = in_place ? nullptr : scratch<kRoom>(static_cast<size_t>(x.rows * x.cols));
  for (int64_t b = 0; b < x.rows && !in_place; ++b)
    for (int64_t k = 0; k < x.cols; ++k)
      room[b * x.cols + k] = to_float(data[b * x.stride + (permutation ? permutation[k] : k)]);
  const float* const examples = in_place ? static_cast<const float*>(x.data) : room;
  const int64_t stride = in_place ? x.stride : x.cols;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < out; n += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, out - n));
    const int32_t first = rows.start[n], last = rows.start[n + count];
    float* const picked = scratch<kPicked>(static_cast<size_t>(last - first));
    for (int64_t b = 0; b < x.rows; ++b) {
      const float* const example = examples + b * stride;
#pragma GCC unroll 8
      for (int32_t t = first; t < last; ++t) picked[t - first] = example[rows.indices[t]];
      const auto dot = [&](int r) __attribute__((always_inline)) {
        if (r >= count) return Vector{};
        const int32_t t = rows.start[n + r];
        return products(rows.values + t, picked + (t - first), rows.start[n + r + 1] - t);
      };
      alignas(64) float sums[kLanes];
      store(sums, fold<kLanes / 2>(dot, 0));
      write_block<T>(sums, kLanes, b, 1, n, count, y, out);
    }
  }
}

// All panels of x, by all threads of the region, which must wait for each other before they read them.
template <int V, class T>
void transpose_all(const Matrix& x, const int32_t* permutation, bool past, float* panels) {
  constexpr int64_t kStep = 128, wide = V * kLanes;
  const int64_t count = (x.rows + wide - 1) / wide, slices = (x.cols + kStep - 1) / kStep;
#pragma omp for schedule(static) collapse(2) nowait
  for (int64_t p = 0; p < count; ++p)
    for (int64_t s = 0; s < slices; ++s)
      transpose_panel<T>(x, p * wide, V, s * kStep, std::min(x.cols, (s + 1) * kStep), permutation, past,
                         panels + p * wide * x.cols);
  drain();
}

// y of transposed panels of `batch` examples with `in` features, shared out among the threads of the region.
template <int V, class T>
void multiply_all(const float* panels, int64_t batch, int64_t in, const Rows& rows, const Output& y,
                  int64_t out, int threads) {
  constexpr int64_t wide = V * kLanes;
  const int64_t count = (batch + wide - 1) / wide;
  const int64_t chunk =
      std::max<int64_t>(kLanes, (out * count / (16 * threads) + kLanes - 1) / kLanes * kLanes);
  const int64_t chunks = (out + chunk - 1) / chunk;
#pragma omp for schedule(dynamic, 1) collapse(2) nowait
  for (int64_t p = 0; p < count; ++p)
    for (int64_t c = 0; c < chunks; ++c)
      multiply_chunk<V, T>(rows, panels + p * wide * in, p * wide, batch, c * chunk,
                           std::min(out, (c + 1) * chunk), y, out);
}

template <int V, class T>
void multiply_panels(const Matrix& x, int64_t out, const Rows& rows, const int32_t* permutation,
                     const Output& y, int threads) {
  float* const panels = scratch<kRoom>(panel_floats<V>(x));
  const bool past = written_past(x.rows * x.cols, panels, threads);
#pragma omp parallel num_threads(threads)
  {
    transpose_all<V, T>(x, permutation, past, panels);
#pragma omp barrier
    multiply_all<V, T>(panels, x.rows, x.cols, rows, y, out, threads);
  }
}

template <int V>
inline Vector dot_lanes(const Vector* left, const float* right) {
  Vector even = left[0] * load(right), odd = Vector{};
#pragma GCC unroll 8
  for (int v = 1; v < V; ++v) (v & 1 ? odd : even) += left[v] * load(right + v * kLanes);
  return even + odd;
}

// Dots of the nonzeros 0 .. last of one row with a panel, as one vector.  `Count` are computed, those past
// `last` in vain, so that nothing branches.
template <int V, int Count>
inline __attribute__((always_inline)) Vector sample_lanes(const Vector* left, const float* panel,
                                                          const uint16_t* indices, int last) {
  const auto dot = [&](int j) __attribute__((always_inline)) {
    if (j >= Count) return Vector{};
    return dot_lanes<V>(left, panel + static_cast<int64_t>(indices[std::min(j, last)]) * V * kLanes);
  };
  return fold<kLanes / 2>(dot, 0);
}

template <int V>
inline Vector sample_rest(const Vector* left, const float* panel, const uint16_t* indices, int last) {
  constexpr int kQuarter = kLanes / 4;
  switch (last / kQuarter) {
    case 0: return sample_lanes<V, kQuarter>(left, panel, indices, last);
    case 1: return sample_lanes<V, 2 * kQuarter>(left, panel, indices, last);
    case 2: return sample_lanes<V, 3 * kQuarter>(left, panel, indices, last);
    default: return sample_lanes<V, kLanes>(left, panel, indices, last);
  }
}

// The parts of a panel of x that fit the second-level cache; rows that have int8 tiles are not sorted, and
// cannot be cut into parts.
template <int V>
int64_t sample_parts(const Weight& weight) {
  constexpr int64_t kCacheFloats = int64_t{1} << 17;
  const Direction d = direction_of(weight, false);
  for (int64_t i = 0; i < d.tiles_out; ++i)
    if (d.count[2 * i + 1]) return 1;
  return std::max<int64_t>(1, (d.in * V * kLanes + kCacheFloats - 1) / kCacheFloats);
}

// gW of transposed panels of grad_y (left) and x (right), shared out among the threads of the region;
// `values` has room for one number for each nonzero.
template <int V, class T>
void sample_all(const float* left, const float* right, int64_t batch, int64_t out, int64_t in,
                const Rows& rows, int64_t parts, float* values, T* grad_w) {
  constexpr int64_t wide = V * kLanes;
  const int64_t panels = (batch + wide - 1) / wide;
  // One part of a panel of x at a time stays in the second-level cache.  A row of the weight is always the
  // same thread's, so threads need not wait for each other.
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t part = 0; part < parts; ++part) {
#pragma omp for schedule(static) nowait
      for (int64_t n = 0; n < out; ++n) {
        Vector g[V];
        for (int v = 0; v < V; ++v) g[v] = load(left + (p * out + n) * wide + v * kLanes);
        const uint16_t* const first = rows.indices + rows.start[n];
        const uint16_t* const last = rows.indices + rows.start[n + 1];
        const auto border = [&](int64_t of) {
          return of == parts ? last : std::lower_bound(first, last, static_cast<uint16_t>(in * of / parts));
        };
        const int32_t end = static_cast<int32_t>(border(part + 1) - rows.indices);
        for (int32_t t = static_cast<int32_t>((part ? border(part) : first) - rows.indices); t < end;
             t += kLanes) {
          const int count = std::min(kLanes, end - t);
          const float* const panel = right + p * in * wide;
          if (count == kLanes) {
            Vector dots = sample_lanes<V, kLanes>(g, panel, rows.indices + t, kLanes - 1);
            if (p) dots += load(values + t);
            store(values + t, dots);
          } else {
            const Vector dots = sample_rest<V>(g, panel, rows.indices + t, count - 1);
            for (int j = 0; j < count; ++j) values[t + j] = (p ? values[t + j] : 0.0f) + dots[j];
          }
        }
      }
    }
#pragma omp for schedule(static) nowait
  for (int64_t n = 0; n < out; ++n) {
    T* row = grad_w + n * in;
    std::memset(row, 0, static_cast<size_t>(in) * sizeof(T));
    if (panels)
      for (int32_t t = rows.start[n]; t < rows.start[n + 1]; ++t)
        row[rows.indices[t]] = from_float<T>(values[t]);
  }
}

template <int V, class T>
void sample_panels(const Matrix& grad_y, const Matrix& x, const Weight& weight, const Rows& rows,
                   const int32_t* output_permutation, const int32_t* input_permutation, T* grad_w,
                   int threads) {
  const int64_t parts = sample_parts<V>(weight);
  float* const left = scratch<kRoom>(panel_floats<V>(grad_y));
  float* const right = scratch<kRight>(panel_floats<V>(x));
  float* const values = scratch<kValues>(static_cast<size_t>(rows.start[grad_y.cols]));
#pragma omp parallel num_threads(threads)
  {
    transpose_all<V, T>(grad_y, output_permutation, false, left);
    transpose_all<V, T>(x, input_permutation, false, right);
#pragma omp barrier
    sample_all<V>(left, right, x.rows, grad_y.cols, x.cols, rows, parts, values, grad_w);
  }
}

// Both gradients from one transposed grad_y.
template <int V, class T>
void backward_panels(const Matrix& grad_y, const Matrix& x, const Weight& weight, const Rows& rows,
                     const Rows& transposed, const int32_t* output_permutation,
                     const int32_t* input_permutation, const Output& grad_x, T* grad_w, int threads) {
  const int64_t parts = sample_parts<V>(weight);
  float* const left = scratch<kRoom>(panel_floats<V>(grad_y));
  float* const right = scratch<kRight>(panel_floats<V>(x));
  float* const values = scratch<kValues>(static_cast<size_t>(rows.start[grad_y.cols]));
  const bool past = written_past(grad_y.rows * grad_y.cols, left, threads);
#pragma omp parallel num_threads(threads)
  {
    transpose_all<V, T>(grad_y, output_permutation, past, left);
    transpose_all<V, T>(x, input_permutation, false, right);
#pragma omp barrier
    multiply_all<V, T>(left, x.rows, grad_y.cols, transposed, grad_x, x.cols, threads);
    sample_all<V>(left, right, x.rows, grad_y.cols, x.cols, rows, parts, values, grad_w);
  }
}

}  // namespace

void multiply_rows(const Matrix& x, int64_t out, const Rows& rows, const int32_t* input_permutation,
                   const Output& y, int threads) {
  with_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (x.rows < kLanes && x.rows <= 8) return multiply_few<T>(x, out, rows, input_permutation, y, threads);
    switch (x.rows <= kLanes       ? 1
            : x.rows <= 2 * kLanes ? std::min(2, panel_vectors(x.cols))
                                   : panel_vectors(x.cols)) {
      case 4: return multiply_panels<4, T>(x, out, rows, input_permutation, y, threads);
      case 2: return multiply_panels<2, T>(x, out, rows, input_permutation, y, threads);
      default: return multiply_panels<1, T>(x, out, rows, input_permutation, y, threads);
    }
  });
}

void sample_rows(const Matrix& grad_y, const Matrix& x, const Weight& weight, const Rows& rows,
                 const int32_t* output_permutation, const int32_t* input_permutation, void* grad_w,
                 int threads) {
  with_type(weight.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto sample = [&](auto vectors) {
      sample_panels<vectors, T>(grad_y, x, weight, rows, output_permutation, input_permutation,
                                static_cast<T*>(grad_w), threads);
    };
    // With 16 lanes, panels twice as wide halve the sums over lanes, yet fit the cache in parts alone:
    // slower.
    if (kLanes < 16 && x.rows > 4 * kLanes)
      sample(std::integral_constant<int, 8>{});
    else if (x.rows > 2 * kLanes)
      sample(std::integral_constant<int, 4>{});
    else
      sample(std::integral_constant<int, 2>{});
  });
}

void backward_rows(const Matrix& grad_y, const Matrix& x, const Weight& weight, const Rows& rows,
                   const Rows& transposed, const int32_t* output_permutation,
                   const int32_t* input_permutation, const Output& grad_x, void* grad_w, int threads) {
  // Both products then want panels of the same width.
  if (kLanes >= 16 && x.rows > 2 * kLanes && panel_vectors(grad_y.cols) == 4)
    return with_type(x.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      backward_panels<4, T>(grad_y, x, weight, rows, transposed, output_permutation, input_permutation,
                            grad_x, static_cast<T*>(grad_w), threads);
    });
  multiply_rows(grad_y, x.cols, transposed, output_permutation, grad_x, threads);
  sample_rows(grad_y, x, weight, rows, output_permutation, input_permutation, grad_w, threads);
}

}  // namespace rlnas::RLNAS_ISA
