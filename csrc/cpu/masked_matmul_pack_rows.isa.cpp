// Brings a masked weight into compressed rows, or its columns.
#include <memory>
#include <vector>

#include "cpu/masked_matmul_simd.h"

namespace rlnas::RLNAS_ISA {
namespace {

template <class T>
float weight_at(const Weight& w, int64_t n, int64_t k, bool int8, float scale) {
  const int64_t at = n * w.in_features + k;
  return int8 ? scale * static_cast<float>(w.payload[at]) : to_float(static_cast<const T*>(w.data)[at]);
}

uint32_t piece_bits(const Weight& w, int64_t n, int64_t k, int steps) {
  if (!w.bits) return steps == 32 ? 0xffffffffu : (1u << steps) - 1;
  return bits_at(w.bits + n * ((w.in_features + 31) / 32), k, steps);
}

// Calls f(n, k, bits, int8, scale) for each run of at most 32 kept weights of row n in tile (i, j).
template <class F>
void each_piece(const Weight& w, int64_t i, int64_t j, bool int8, int64_t n, F f) {
  const int64_t tiles_k = (w.in_features + w.tile_cols - 1) / w.tile_cols;
  const int64_t k1 = std::min(w.in_features, (j + 1) * w.tile_cols);
  const float scale = int8 ? w.scale[i * tiles_k + j] : 1.0f;
  for (int64_t k = j * w.tile_cols; k < k1; k += 32) {
    const int steps = static_cast<int>(std::min<int64_t>(32, k1 - k));
    if (const uint32_t bits = piece_bits(w, n, k, steps)) f(k, bits, int8, scale);
  }
}

template <class F>
inline void each_piece_of_row(const Weight& w, const Direction& d, int64_t n, F f) {
  const int64_t i = n / d.tile_out, live = d.count[2 * i] + d.count[2 * i + 1];
  if (w.bits && d.count[2 * i] == d.tiles_in) {  // no tile pruned or int8: words as they come
    const int64_t words = (d.in + 31) / 32;
    const int32_t* row = w.bits + n * words;
    for (int64_t word = 0; word < words; ++word)
      if (row[word]) f(word * 32, static_cast<uint32_t>(row[word]), false, 1.0f);
    return;
  }
  for (int64_t t = 0; t < live; ++t) each_piece(w, i, d.tiles[i * d.tiles_in + t], t >= d.count[2 * i], n, f);
}

// A row being gathered: room for whole vectors past its end, which the compressed rows themselves do not
// have.  Each thread keeps one.
struct Gathered {
  uint16_t indices[(1 << 16) + 32];
  float values[(1 << 16) + 32];
};

Gathered& gathered() {
  static thread_local std::unique_ptr<Gathered> room;
  if (!room) room.reset(new Gathered);  // not zeroed
  return *room;
}

template <class T>
inline int32_t append(const Weight& w, int64_t n, int64_t k, uint32_t bits, bool int8, float scale,
                      bool with_values, Gathered& row, int32_t at) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, float>)
    if (!int8) {
      const float* source = static_cast<const float*>(w.data) + n * w.in_features + k;
      // Masked loads do not set off the CPU's own prefetching: without this, twice the time and more.
      if (with_values)
        for (int ahead : {1024, 1024 + kLanes})
          _mm_prefetch(reinterpret_cast<const char*>(source + ahead), _MM_HINT_T0);
      const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
      for (int half = 0; half < 2; ++half, bits >>= 16) {
        const __mmask16 kept = static_cast<__mmask16>(bits);
        const __m512i index = _mm512_maskz_compress_epi32(
            kept, _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(k) + 16 * half)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(row.indices + at),
                            _mm512_maskz_cvtepi32_epi16(0xffff, index));
        if (with_values)
          _mm512_storeu_ps(row.values + at,
                           _mm512_maskz_compress_ps(kept, _mm512_maskz_loadu_ps(kept, source + 16 * half)));
        at += __builtin_popcount(kept);
      }
      return at;
    }
#endif
  for (; bits; bits &= bits - 1, ++at) {
    const int64_t column = k + __builtin_ctz(bits);
    row.indices[at] = static_cast<uint16_t>(column);
    if (with_values) row.values[at] = weight_at<T>(w, n, column, int8, scale);
  }
  return at;
}

template <class T>
int32_t gather_row(const Weight& w, const Direction& d, int64_t n, bool with_values, Gathered& row) {
  int32_t count = 0;
  each_piece_of_row(w, d, n, [&](int64_t k, uint32_t bits, bool int8, float scale) {
    count = append<T>(w, n, k, bits, int8, scale, with_values, row, count);
  });
  return count;
}

// A row belongs to one thread, which counts its weights, and after all have counted writes them.
template <class T>
void pack_forward(const Weight& w, const Rows& rows, int threads) {
  const Direction d = direction_of(w, false);
  rows.start[0] = 0;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < d.out; ++n) {
      int32_t count = 0;
      each_piece_of_row(w, d, n,
                        [&](int64_t, uint32_t bits, bool, float) { count += __builtin_popcount(bits); });
      rows.start[n + 1] = count;
    }
#pragma omp single
    for (int64_t n = 0; n < d.out; ++n) rows.start[n + 1] += rows.start[n];
    Gathered& row = gathered();
#pragma omp for schedule(static)
    for (int64_t n = 0; n < d.out; ++n) {
      const auto count = static_cast<size_t>(gather_row<T>(w, d, n, rows.values != nullptr, row));
      std::memcpy(rows.indices + rows.start[n], row.indices, count * sizeof(uint16_t));
      if (rows.values) std::memcpy(rows.values + rows.start[n], row.values, count * sizeof(float));
    }
  }
}

// Makes counts of each part in each column, [parts][columns], the places where the parts begin, and fills
// `start`; returns the sum.
int32_t starts(std::vector<int32_t>& places, int64_t columns, int parts, int32_t* start) {
  int32_t total = 0;
  for (int64_t k = 0; k < columns; ++k) {
    start[k] = total;
    for (int part = 0; part < parts; ++part) {
      int32_t& place = places[static_cast<size_t>(part * columns + k)];
      const int32_t count = place;
      place = total;
      total += count;
    }
  }
  return total;
}

// Appends row n to the columns that it meets.
void scatter_row(const uint16_t* indices, const float* values, int32_t count, int64_t n, int32_t* place,
                 const Rows& to) {
  for (int32_t t = 0; t < count; ++t) {  // all ends of columns do not fit the first-level cache
    const int32_t at = place[indices[t]];
    __builtin_prefetch(to.indices + at, 1);
    __builtin_prefetch(to.values + at, 1);
  }
  for (int32_t t = 0; t < count; ++t) {
    const int32_t at = place[indices[t]]++;
    to.indices[at] = static_cast<uint16_t>(n);
    to.values[at] = values[t];
  }
}

// Columns of the weight become rows.  The weight is read in its own order: each of `threads` parts of its
// rows has a place in every column, found by counting first.
template <class T>
void pack_transposed(const Weight& w, const Rows& rows, int threads) {
  const Direction d = direction_of(w, false);
  std::vector<int32_t> places(static_cast<size_t>(threads * d.in));
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int part = 0; part < threads; ++part) {
      int32_t* place = places.data() + part * d.in;
      for (int64_t n = d.out * part / threads; n < d.out * (part + 1) / threads; ++n)
        each_piece_of_row(w, d, n, [&](int64_t k, uint32_t bits, bool, float) {
          for (; bits; bits &= bits - 1) ++place[k + __builtin_ctz(bits)];
        });
    }
#pragma omp single
    rows.start[d.in] = starts(places, d.in, threads, rows.start);
#pragma omp for schedule(static)
    for (int part = 0; part < threads; ++part) {
      int32_t* place = places.data() + part * d.in;
      Gathered& row = gathered();
      for (int64_t n = d.out * part / threads; n < d.out * (part + 1) / threads; ++n) {
        const int32_t count = gather_row<T>(w, d, n, true, row);
        scatter_row(row.indices, row.values, count, n, place, rows);
      }
    }
  }
}

}  // namespace

void pack_rows(const Weight& weight, bool transposed, const Rows& rows, int threads) {
  with_type(weight.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    transposed ? pack_transposed<T>(weight, rows, threads) : pack_forward<T>(weight, rows, threads);
  });
}

// The weight's columns as rows, from its rows.
void transpose_rows(const Rows& rows, int64_t out, int64_t in, const Rows& to, int threads) {
  std::vector<int32_t> places(static_cast<size_t>(threads * in));
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int part = 0; part < threads; ++part) {
      int32_t* const place = places.data() + part * in;
      const int32_t end = rows.start[out * (part + 1) / threads];
      for (int32_t t = rows.start[out * part / threads]; t < end; ++t) ++place[rows.indices[t]];
    }
#pragma omp single
    to.start[in] = starts(places, in, threads, to.start);
#pragma omp for schedule(static)
    for (int part = 0; part < threads; ++part) {
      int32_t* const place = places.data() + part * in;
      for (int64_t n = out * part / threads; n < out * (part + 1) / threads; ++n)
        scatter_row(rows.indices + rows.start[n], rows.values + rows.start[n],
                    rows.start[n + 1] - rows.start[n], n, place, to);
    }
  }
}

}  // namespace rlnas::RLNAS_ISA
