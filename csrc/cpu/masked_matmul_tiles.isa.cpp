// Products over lists of tiles: forward, gradient to x, and the sampled product of the gradient to the
// weight.
#include "cpu/masked_matmul_kernel.h"
#include "cpu/scratch.h"

namespace rlnas::RLNAS_ISA {
namespace {

// Blocks before tile row i, when each live tile makes blocks_in_tile of them.
struct Offsets {
  explicit Offsets(const Direction& d, Kinds kinds) : d_(d), kinds_(kinds) {}
  int64_t live(int64_t i) const {
    return (kinds_ != Kinds::int8 ? d_.count[2 * i] : 0) + (kinds_ != Kinds::keep ? d_.count[2 * i + 1] : 0);
  }
  const int32_t* list(int64_t i) const {
    return d_.tiles + i * d_.tiles_in + (kinds_ == Kinds::int8 ? d_.count[2 * i] : 0);
  }
  int64_t before(int64_t i) const {
    int64_t total = 0;
    for (int64_t j = 0; j < i; ++j) total += live(j);
    return total;
  }

 private:
  const Direction& d_;
  Kinds kinds_;
};

// A 32 x 32 piece (or less) of the weight as floats, rows `stride` apart: where it lies, masked as it is
// read, if it is complete; else a copy.
template <class T>
struct Piece {
  alignas(64) float stage[32 * 32];
  uint32_t kept[32];
  const float* rows;
  int64_t stride;
  bool masked = false;

  Piece(const Weight& w, int64_t n0, int64_t rn, int64_t k0, int64_t rk, bool int8, float scale,
        bool complete) {
    if constexpr (std::is_same_v<T, float>)
      if (complete && !int8) {
        rows = static_cast<const float*>(w.data) + n0 * w.in_features + k0;
        stride = w.in_features;
        masked = w.bits;
        const int64_t words = (w.in_features + 31) / 32;
        for (int64_t r = 0; masked && r < rn; ++r)
          kept[r] = bits_at(w.bits + (n0 + r) * words, k0, static_cast<int>(rk));
        return;
      }
    for (int64_t r = 0; r < rn; ++r)
      fetch_row<T>(w, n0 + r, k0, static_cast<int>(rk), int8, scale, stage + r * 32);
    std::memset(stage + rn * 32, 0, static_cast<size_t>(32 - rn) * 32 * sizeof(float));
    rows = stage;
    stride = 32;
  }

  Vector at(int64_t r, int64_t k) const {
    const Vector v = load(rows + r * stride + k);
    return masked ? select(v, kept[r] >> k & ((1ull << kLanes) - 1)) : v;
  }
};

template <class T>
void transpose_to(const Piece<T>& piece, int64_t steps, int64_t width, float* to) {
  for (int64_t c = 0; c < width; c += kLanes)
    for (int64_t k = 0; k < steps; k += kLanes) {
      Vector r[kLanes];
      for (int i = 0; i < kLanes; ++i) r[i] = piece.at(c + i, k);
      transpose(r);
      for (int64_t j = 0; j < std::min<int64_t>(kLanes, steps - k); ++j)
        store(to + (k + j) * width + c, r[j]);
    }
}

template <class T>
void pack_tile(const Weight& w, bool transposed, int64_t i, int64_t j, bool int8, int64_t block, float* to) {
  // Outputs o0.. (at most `width`) against the inner steps of tile j.
  const Direction d = direction_of(w, transposed);
  const int64_t width = block_width(d.tile_out);
  const int64_t o0 = i * d.tile_out + block * width;
  const int64_t columns = std::min({width, (i + 1) * d.tile_out - o0, d.out - o0});
  const int64_t s0 = j * d.tile_in, steps = std::min(d.tile_in, d.in - s0);
  const int64_t tiles_k = transposed ? d.tiles_out : d.tiles_in;
  const float scale = int8 ? w.scale[(transposed ? j : i) * tiles_k + (transposed ? i : j)] : 1.0f;
  for (int64_t s = 0; s < steps; s += 32) {
    const int64_t n = std::min<int64_t>(32, steps - s);
    if (!transposed) {
      const Piece<T> piece(w, o0, std::max<int64_t>(columns, 0), s0 + s, n, int8, scale,
                           columns == width && n % kLanes == 0);
      transpose_to(piece, n, width, to + s * width);
    } else {
      const Piece<T> piece(w, s0 + s, n, o0, std::max<int64_t>(columns, 0), int8, scale, columns == width);
      for (int64_t k = 0; k < n; ++k)
        for (int64_t c = 0; c < width; c += kLanes) store(to + (s + k) * width + c, piece.at(k, c));
    }
  }
}

// The live tiles of tile row i, block after block.
template <class T>
void pack_row(const Weight& w, bool transposed, Kinds kinds, int64_t i, float* to) {
  const Direction d = direction_of(w, transposed);
  const Offsets offsets(d, kinds);
  const int64_t size = block_width(d.tile_out) * d.tile_in, blocks = blocks_in_tile(d.tile_out);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t t = 0; t < offsets.live(i); ++t, to += size)
      pack_tile<T>(w, transposed, i, offsets.list(i)[t], kinds == Kinds::int8 || t >= d.count[2 * i], b, to);
}

using PackRow = void (*)(const Weight&, bool, Kinds, int64_t, float*);

PackRow row_packer(Dtype dtype) {
  return with_type(dtype,
                   [](auto* type) -> PackRow { return pack_row<std::remove_pointer_t<decltype(type)>>; });
}

// Features [first, first + size) of one example in float, size <= kLanes; with `spill` all of the vector at
// `to` may be written.
template <class T>
inline void copy_features(const T* row, const int32_t* permutation, int64_t first, int size, int64_t features,
                          bool spill, float* to) {
  if constexpr (std::is_same_v<T, float>)
    if (!permutation && first + kLanes <= features && (spill || size == kLanes))
      return store(to, load(row + first));
  for (int r = 0; r < size; ++r) to[r] = to_float(row[permutation ? permutation[first + r] : first + r]);
}

constexpr int64_t kStep = 256;  // of the inner dimension, packed at a time

// pack_panel of at most kStep steps, past the caches if wanted.
template <class T>
void pack_slice(const T* x, int64_t stride, int64_t first, int rows, int64_t k0, int64_t k1,
                const int32_t* permutation, bool past, float* panel) {
  float* const place = panel + k0 * rows;
  if (!past) return pack_panel(x, stride, first, rows, k0, k1, permutation, place);
  alignas(64) float stage[kStep * kPanel];
  pack_panel(x, stride, first, rows, k0, k1, permutation, stage);
  copy_past(place, stage, (k1 - k0) * rows);
}

// Tile rows [i0, i1) of the weight, packed at `tiles`, against panels [p0, p1) of x, packed at `a`.
template <class T>
void multiply_range(const Direction& d, const Offsets& offsets, int64_t i0, int64_t i1, const float* tiles,
                    const Panels& panels, int64_t p0, int64_t p1, const float* a, const Output& y) {
  alignas(64) float sum[kPanel * kBlock];
  const int64_t width = block_width(d.tile_out), blocks = blocks_in_tile(d.tile_out);
  for (int64_t i = i0; i < i1; ++i) {
    const Chain chain{offsets.list(i), offsets.live(i), d.tile_in, d.in};
    for (int64_t b = 0; b < blocks; ++b, tiles += chain.count * width * d.tile_in) {
      const int64_t o0 = i * d.tile_out + b * width;
      const int64_t columns = std::min({width, (i + 1) * d.tile_out - o0, d.out - o0});
      if (columns <= 0) continue;
      for (int64_t p = p0; p < p1; ++p) {
        const int64_t first = panels.first(p);
        expect_block<T>(first, panels.size(p), o0, columns, y, d.out);
        multiply_block(panels.size(p), a + (first - panels.first(p0)) * d.in, tiles, width, chain, sum);
        write_block<T>(sum, width, first, panels.size(p), o0, columns, y, d.out);
      }
    }
  }
}

}  // namespace

void pack_tiles(const Weight& weight, bool transposed, Kinds kinds, float* packed, int threads) {
  const Direction d = direction_of(weight, transposed);
  const Offsets offsets(d, kinds);
  const int64_t tile_floats = blocks_in_tile(d.tile_out) * block_width(d.tile_out) * d.tile_in;
  const PackRow pack = row_packer(weight.dtype);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < d.tiles_out; ++i)
    pack(weight, transposed, kinds, i, packed + offsets.before(i) * tile_floats);
}

// Many examples: all threads pack the weight, then a task packs a group of panels of x into its second-level
// cache and passes over the whole weight.  Few: all pack x, then a task packs a run of tile rows and all
// panels pass over it.
void multiply_tiles(const Matrix& x, const Weight& weight, bool transposed, Kinds kinds, const float* packed,
                    const int32_t* input_permutation, const Output& y, int threads) {
  constexpr int64_t kRunFloats = int64_t{1} << 17, kGroupFloats = int64_t{3} << 16;
  const Direction d = direction_of(weight, transposed);
  const Panels panels(x.rows, kPanel);
  const Offsets offsets(d, kinds);
  const int64_t tile_floats = blocks_in_tile(d.tile_out) * block_width(d.tile_out) * d.tile_in;
  const int64_t weight_floats = offsets.before(d.tiles_out) * tile_floats;
  const PackRow pack = row_packer(weight.dtype);
  if (panels.count >= 4 * threads) {
    const int64_t fit = std::max<int64_t>(1, kGroupFloats / (d.in * kPanel + 1));
    const int64_t rounds = std::max<int64_t>(4, (panels.count + fit * threads - 1) / (fit * threads));
    const Panels groups(panels.count, (panels.count + rounds * threads - 1) / (rounds * threads));
    const bool past = threads > 1 && weight_floats > kSharedFloats;
    float* const shared = packed ? nullptr : scratch<kRoom>(static_cast<size_t>(weight_floats + kLanes));
    const float* const tiles = packed ? packed : shared;
    with_type(x.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel num_threads(threads)
      {
        if (!packed) {
#pragma omp for schedule(static) nowait
          for (int64_t i = 0; i < d.tiles_out; ++i) {
            const int64_t floats = offsets.live(i) * tile_floats;
            float* const place = shared + offsets.before(i) * tile_floats;
            float* const to = past ? scratch<kRun>(static_cast<size_t>(floats + kLanes)) : place;
            pack(weight, transposed, kinds, i, to);
            if (past) copy_past(place, to, floats);
          }
          drain();
#pragma omp barrier
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t g = 0; g < groups.count; ++g) {
          const int64_t p0 = groups.first(g), p1 = p0 + groups.size(g), first = panels.first(p0);
          const int64_t examples = panels.first(p1) - first;
          float* const a = scratch<kRun>(static_cast<size_t>(examples * d.in + kLanes));
          for (int64_t p = p0; p < p1; ++p)
            pack_panel(static_cast<const T*>(x.data), x.stride, panels.first(p), panels.size(p), 0, d.in,
                       input_permutation, a + (panels.first(p) - first) * d.in);
          multiply_range<T>(d, offsets, 0, d.tiles_out, tiles, panels, p0, p1, a, y);
        }
      }
    });
    return;
  }
  const int64_t row_floats = weight_floats / std::max<int64_t>(1, d.tiles_out) + 1;
  const int64_t rows_in_run =
      std::clamp<int64_t>(kRunFloats / row_floats, 1, std::max<int64_t>(1, d.tiles_out / (8 * threads)));
  const int64_t runs = (d.tiles_out + rows_in_run - 1) / rows_in_run;
  const int64_t slices = (d.in + kStep - 1) / kStep;
  const bool past = threads > 1 && x.rows * d.in > kSharedFloats;
  float* const a = scratch<kRoom>(static_cast<size_t>(x.rows * d.in + kLanes));
  with_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) collapse(2) nowait
      for (int64_t p = 0; p < panels.count; ++p)
        for (int64_t s = 0; s < slices; ++s)
          pack_slice(static_cast<const T*>(x.data), x.stride, panels.first(p), panels.size(p), s * kStep,
                     std::min(d.in, (s + 1) * kStep), input_permutation, past, a + panels.first(p) * d.in);
      drain();
#pragma omp barrier
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t run = 0; run < runs; ++run) {
        const int64_t i0 = run * rows_in_run, i1 = std::min(d.tiles_out, i0 + rows_in_run);
        const int64_t before = offsets.before(i0);
        const float* tiles = packed ? packed + before * tile_floats : nullptr;
        if (!packed) {
          float* to =
              scratch<kRun>(static_cast<size_t>((offsets.before(i1) - before) * tile_floats + kLanes));
          tiles = to;
          for (int64_t i = i0; i < i1; to += offsets.live(i++) * tile_floats)
            pack(weight, transposed, kinds, i, to);
        }
        multiply_range<T>(d, offsets, i0, i1, tiles, panels, 0, panels.count, a, y);
      }
    }
  });
}

// grad_w[n, k] = sum over b of grad_y[b, n] * x[b, k] in live tiles: the same product, the batch inside.
void sample_tiles(const Matrix& grad_y, const Matrix& x, const Weight& weight,
                  const int32_t* output_permutation, const int32_t* input_permutation, void* grad_w,
                  int threads) {
  constexpr int64_t kExamples = 64, kAhead = 16;        // packed at a time, fetched ahead
  constexpr int64_t kLargeGradient = int64_t{1} << 20;  // elements: other layers' come before it is read
  const Direction d = direction_of(weight, false);
  const int64_t width = block_width(d.tile_in), blocks = blocks_in_tile(d.tile_in), batch = x.rows;
  const int64_t depth = batch + 1;  // blocks a power of two apart would share a few sets of the caches
  float* const right =              // [tile column][block][depth][width]
      scratch<kRoom>(static_cast<size_t>(depth * d.tiles_in * blocks * width));
  const int64_t words = (d.in + 31) / 32, slices = (batch + kExamples - 1) / kExamples;
  const bool past = threads > 1 && batch * d.in > kSharedFloats;
  const bool zeros_past = d.out * d.in > kLargeGradient;
  const int32_t all[] = {0};
  const Chain chain{all, 1, batch, batch};
  with_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const gy = static_cast<const T*>(grad_y.data);
    const T* const xs = static_cast<const T*>(x.data);
    T* const gw = static_cast<T*>(grad_w);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) collapse(2) nowait
      for (int64_t block = 0; block < d.tiles_in * blocks; ++block)
        for (int64_t slice = 0; slice < slices; ++slice) {
          alignas(64) float stage[kExamples * kBlock];
          const int64_t j = block / blocks, k0 = j * d.tile_in + block % blocks * width;
          const int64_t n = std::max<int64_t>(0, std::min({width, (j + 1) * d.tile_in - k0, d.in - k0}));
          const int64_t b0 = slice * kExamples, b1 = std::min(batch, b0 + kExamples);
          float* const place = right + (block * depth + b0) * width;
          float* const start = past ? stage : place;
          for (int64_t b = b0; b < b1; ++b) {
            const T* const row = xs + b * x.stride;
            float* const to = start + (b - b0) * width;
            // Each example lies on a page of its own, out of sight of the CPU's own prefetching.
            __builtin_prefetch(row + kAhead * x.stride + k0);
            __builtin_prefetch(row + kAhead * x.stride + k0 + 16);
            for (int64_t c = 0; c < n; c += kLanes)
              copy_features(row, input_permutation, k0 + c,
                            static_cast<int>(std::min<int64_t>(kLanes, n - c)), d.in, true, to + c);
            for (int64_t c = n; c < width; ++c) to[c] = 0;
          }
          if (past) copy_past(place, stage, (b1 - b0) * width);
        }
      drain();
#pragma omp barrier
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t i = 0; i < d.tiles_out; ++i) {
        alignas(64) float sum[kPanel * kBlock];
        const int64_t n0 = i * d.tile_out, rows = std::min(d.tile_out, d.out - n0);
        const int64_t live = d.count[2 * i] + d.count[2 * i + 1];
        if (zeros_past && !d.count[2 * i + 1]) {
          for (int64_t n = n0; n < n0 + rows; ++n) {
            int64_t k = 0;
            for (int64_t t = 0; t < live; ++t) {
              const int64_t k0 = d.tiles[i * d.tiles_in + t] * d.tile_in;
              zero_past(gw + n * d.in + k, k0 - k);
              k = std::min(d.in, k0 + d.tile_in);
            }
            zero_past(gw + n * d.in + k, d.in - k);
          }
        } else {  // int8 tiles come after keep tiles, so out of order
          std::memset(gw + n0 * d.in, 0, static_cast<size_t>(rows * d.in) * sizeof(T));
        }
        const Panels panels(rows, kPanel);
        float* const left =
            scratch<kRun>(static_cast<size_t>(batch * rows + kLanes));  // [panel][batch][rows of the panel]
        for (int64_t b = 0; b < batch; ++b)
          for (int64_t p = 0; p < panels.count; ++p) {
            const int64_t first = panels.first(p), size = panels.size(p);
            const T* const row = gy + b * grad_y.stride;
            __builtin_prefetch(row + kAhead * grad_y.stride + n0 + first);
            // What a whole vector writes past `size` is overwritten by the next examples.
            copy_features(row, output_permutation, n0 + first, panels.size(p), d.out,
                          (batch - b) * size >= kLanes, left + first * batch + b * size);
          }
        for (int64_t t = 0; t < live; ++t) {
          const int64_t j = d.tiles[i * d.tiles_in + t];
          for (int64_t s = 0; s < blocks; ++s) {
            const int64_t k0 = j * d.tile_in + s * width;
            const int64_t n = std::min({width, (j + 1) * d.tile_in - k0, d.in - k0});
            if (n <= 0) continue;
            for (int64_t p = 0; p < panels.count; ++p) {
              const int64_t first = n0 + panels.first(p);
              const int size = panels.size(p);
              expect_lines(gw + first * d.in + k0, d.in, size, n);
              multiply_block(size, left + (first - n0) * batch, right + (j * blocks + s) * depth * width,
                             width, chain, sum);
              if (weight.bits)
                for (int r = 0; r < size; ++r) {
                  const uint32_t bits = bits_at(weight.bits + (first + r) * words, k0, static_cast<int>(n));
                  for (int64_t c = 0; c < width; c += kLanes)
                    store(sum + r * width + c,
                          select(load(sum + r * width + c), bits >> c & ((1ull << kLanes) - 1)));
                }
              write_block<T>(sum, width, first, size, k0, n, {grad_w, x.dtype, nullptr, nullptr}, d.in);
            }
          }
        }
      }
      drain();
    }
  });
}

// At most 8 rows of x: bound by memory, so the weight is read where it lies, once, and never packed.
template <int B, class T>
static void direct_row(const Weight& w, const Direction& d, const float* x, int64_t i, int64_t n,
                       Vector* totals) {
  const int64_t words = (d.in + 31) / 32, live = d.count[2 * i] + d.count[2 * i + 1];
  alignas(64) float stage[32];
  Vector acc[B][2] = {};
  for (int b = 0; b < B; ++b) totals[b] = Vector{};
  int run = 0;
  for (int64_t t = 0; t < live; ++t) {
    const int64_t j = d.tiles[i * d.tiles_in + t], k1 = std::min(d.in, (j + 1) * d.tile_in);
    const bool int8 = t >= d.count[2 * i];
    for (int64_t k = j * d.tile_in; k < k1; k += 32) {
      const int steps = static_cast<int>(std::min<int64_t>(32, k1 - k));
      const uint32_t bits = w.bits ? bits_at(w.bits + n * words, k, steps) : 0xffffffffu;
      if (!bits) continue;
      const bool in_place = std::is_same_v<T, float> && !int8 && steps % kLanes == 0;
      if (!in_place) fetch_row<T>(w, n, k, steps, int8, int8 ? w.scale[i * d.tiles_in + j] : 1.0f, stage);
      const float* source = in_place ? static_cast<const float*>(w.data) + n * d.in + k : stage;
      if (in_place && w.bits)  // masked loads do not set off the CPU's own prefetching
        for (int line = 0; line < 32; line += 16) __builtin_prefetch(source + 1024 + line);
#pragma GCC unroll 8
      for (int c = 0; c < steps; c += kLanes) {
        Vector weights = load(source + c);
        if (w.bits) weights = select(weights, bits >> c & static_cast<uint32_t>((1ull << kLanes) - 1));
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) acc[b][(c / kLanes) & 1] += weights * load(x + b * (d.in + 32) + k + c);
      }
      run += steps / kLanes;
    }
    if (run >= kFlush) {
      for (int b = 0; b < B; ++b) {
        totals[b] += acc[b][0] + acc[b][1];
        acc[b][0] = acc[b][1] = Vector{};
      }
      run = 0;
    }
  }
  for (int b = 0; b < B; ++b) totals[b] += acc[b][0] + acc[b][1];
}

template <int B, class T>
static void direct_rows(const Weight& w, const Direction& d, const float* x, const Output& y, int64_t i) {
  const int64_t n1 = std::min(d.out, (i + 1) * d.tile_out);
  Vector totals[B], lanes[B][kLanes];
  alignas(64) float sums[kLanes];
  for (int64_t n = i * d.tile_out; n < n1; n += kLanes) {
    const int rows = static_cast<int>(std::min<int64_t>(kLanes, n1 - n));
    for (int r = 0; r < kLanes; ++r) {
      if (r < rows) direct_row<B, T>(w, d, x, i, n + r, totals);
      for (int b = 0; b < B; ++b) lanes[b][r] = r < rows ? totals[b] : Vector{};
    }
    for (int b = 0; b < B; ++b) {  // the sum over lanes of each row, all rows at once
      transpose(lanes[b]);
      for (int half = kLanes / 2; half; half /= 2)
        for (int r = 0; r < half; ++r) lanes[b][r] += lanes[b][r + half];
      store(sums, lanes[b][0]);
      write_block<T>(sums, kLanes, b, 1, n, rows, y, d.out);
    }
  }
}

void multiply_direct(const Matrix& x, const Weight& weight, const int32_t* input_permutation, const Output& y,
                     int threads) {
  if (!x.rows) return;
  const Direction d = direction_of(weight, false);
  float* const room = scratch<kRoom>(static_cast<size_t>(x.rows * (d.in + 32)));
  with_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const xs = static_cast<const T*>(x.data);
    for (int64_t b = 0; b < x.rows; ++b) {  // rows end in 32 zeros, so that the last piece reads no further
      float* to = room + b * (d.in + 32);
      for (int64_t k = 0; k < d.in; ++k)
        to[k] = to_float(xs[b * x.stride + (input_permutation ? input_permutation[k] : k)]);
      std::memset(to + d.in, 0, 32 * sizeof(float));
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < d.tiles_out; ++i) switch (x.rows) {
        case 1: direct_rows<1, T>(weight, d, room, y, i); break;
        case 2: direct_rows<2, T>(weight, d, room, y, i); break;
        case 3: direct_rows<3, T>(weight, d, room, y, i); break;
        case 4: direct_rows<4, T>(weight, d, room, y, i); break;
        case 5: direct_rows<5, T>(weight, d, room, y, i); break;
        case 6: direct_rows<6, T>(weight, d, room, y, i); break;
        case 7: direct_rows<7, T>(weight, d, room, y, i); break;
        default: direct_rows<8, T>(weight, d, room, y, i); break;
      }
  });
}

}  // namespace rlnas::RLNAS_ISA
