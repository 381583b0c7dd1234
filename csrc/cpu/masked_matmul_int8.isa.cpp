// int8 tiles against activations quantised per row: x ~ row_scale * q, q in [-127, 127], integer sums.
#include <cmath>

#include "cpu/masked_matmul_kernel.h"

namespace rlnas::RLNAS_ISA {
namespace {

// Bytes are unsigned for VNNI: q + 128; sums start at -128 * (sum of the tile's column), so the zero point is
// exact.
constexpr int kZeroPoint = 128;

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

struct Layout {
  int64_t width, blocks, depth;  // depth: steps of a tile, rounded up to 4
  explicit Layout(const Direction& d)
      : width(block_width(d.tile_out)), blocks(blocks_in_tile(d.tile_out)), depth((d.tile_in + 3) / 4 * 4) {}
};

int64_t tiles_before(const Direction& d, int64_t i) {
  int64_t total = 0;
  for (int64_t j = 0; j < i; ++j) total += d.count[2 * j + 1];
  return total;
}

inline IntVector dot4(IntVector sum, IntVector x, IntVector w) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<IntVector>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(w)));
#else
#pragma GCC unroll 4
  for (int byte = 0; byte < 4; ++byte) sum += ((x >> (8 * byte)) & 255) * ((w << (24 - 8 * byte)) >> 24);
  return sum;
#endif
}

// sum[r][c] = sum over tiles of scale * (x . w); x is [tile][depth / 4][R][4], w is [tile][depth /
// 4][width][4].
template <int R, int V>
void multiply_panel_int8(const uint8_t* x, const int8_t* w, const int32_t* corrections, int64_t width,
                         int64_t depth, const int32_t* tiles, int64_t count, const float* scales,
                         float* sum) {
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(sum + r * width + v * kLanes, Vector{});
  for (int64_t t = 0; t < count; ++t) {
    const uint8_t* xt = x + tiles[t] * depth * R;
    const int8_t* wt = w + t * depth * width;
    IntVector acc[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v)
        acc[r][v] = *reinterpret_cast<const UnalignedIntVector*>(corrections + t * width + v * kLanes);
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth / 4; ++k) {
      IntVector weights[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v)
        weights[v] = *reinterpret_cast<const UnalignedIntVector*>(wt + (k * width + v * kLanes) * 4);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int32_t four;
        std::memcpy(&four, xt + (k * R + r) * 4, 4);
        const IntVector q = IntVector{} + four;
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[r][v] = dot4(acc[r][v], q, weights[v]);
      }
    }
    const Vector scale = splat(scales[tiles[t]]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        float* place = sum + r * width + v * kLanes;
        store(place, load(place) + scale * __builtin_convertvector(acc[r][v], Vector));
      }
  }
}

using Int8Kernel = void (*)(const uint8_t*, const int8_t*, const int32_t*, int64_t, int64_t, const int32_t*,
                            int64_t, const float*, float*);

template <int V, int... R>
constexpr std::array<Int8Kernel, sizeof...(R)> int8_kernels(std::integer_sequence<int, R...>) {
  return {multiply_panel_int8<R + 1, V>...};
}

// Row r of a panel: its scale, and its bytes at [tile][step / 4][r][step % 4].
void quantise_row(const float* x, const Direction& d, const int32_t* permutation, int rows, int r,
                  float* staged, uint8_t* panel, float* row_scale) {
  const Layout layout(d);
  const int64_t padded = (d.in + kLanes - 1) / kLanes * kLanes;
  if (permutation)
    for (int64_t k = 0; k < d.in; ++k) staged[k] = x[permutation[k]];
  else
    std::memcpy(staged, x, static_cast<size_t>(d.in) * sizeof(float));
  for (int64_t k = d.in; k < padded; ++k) staged[k] = 0;
  Vector largest = {}, poison = {};
  for (int64_t k = 0; k < padded; k += kLanes) {
    const Vector v = load(staged + k), magnitude = v < 0 ? -v : v;
    largest = magnitude > largest ? magnitude : largest;
    poison += v * 0.0f;  // NaN where x is NaN or infinite
  }
  float top = 0;
  for (int i = 0; i < kLanes; ++i) top = std::max(top, largest[i]);
  *row_scale = (top > 0 ? top / 127.0f : 1.0f) + sum(poison);
  const float inverse = top > 0 && std::isfinite(top) ? 127.0f / top : 0.0f;
  // Two loops, so that the product is rounded before the sum: the reference has no fused multiply-add.
  for (int64_t k = 0; k < padded; k += kLanes) store(staged + k, load(staged + k) * inverse);
  // Adding and taking away 1.5 * 2^23 rounds to the nearest even integer; NaN becomes 0, its row is poisoned
  // anyway.
  for (int64_t k = 0; k < padded; k += kLanes) {
    const Vector q = (load(staged + k) + 0x1.8p23f) - 0x1.8p23f;
    store(staged + k, q == q ? q : Vector{});
  }
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(staged);  // byte k is written after float k was read
  for (int64_t k = 0; k < padded; k += kLanes) {
    const IntVector q = __builtin_convertvector(load(staged + k), IntVector) + kZeroPoint;
    const Bytes narrow = __builtin_convertvector(q, Bytes);
    std::memcpy(bytes + k, &narrow, kLanes);
  }
  if (layout.depth == d.tile_in && d.in % 4 == 0) {  // tiles follow each other without gaps
    for (int64_t k = 0; k < d.in; k += 4) std::memcpy(panel + k * rows + r * 4, bytes + k, 4);
    return;
  }
  for (int64_t j = 0; j < d.tiles_in; ++j)
    for (int64_t s = 0; s < layout.depth; s += 4) {
      uint8_t four[4];
      for (int c = 0; c < 4; ++c) {
        const int64_t k = j * d.tile_in + s + c;
        four[c] = s + c < d.tile_in && k < d.in ? bytes[k] : static_cast<uint8_t>(kZeroPoint);
      }
      std::memcpy(panel + ((j * layout.depth + s) * rows) + r * 4, four, 4);
    }
}

// A complete tile: four bytes of a row stay together.
void pack_complete_tile(const int8_t* from, int64_t stride, const Layout& layout, int8_t* to,
                        int32_t* corrections) {
  for (int64_t c = 0; c < layout.width; ++c) {
    const int8_t* row = from + c * stride;
    int32_t total = 0;
    for (int64_t s = 0; s < layout.depth; ++s) total += row[s];
    for (int64_t s = 0; s < layout.depth; s += 4) std::memcpy(to + (s * layout.width) + c * 4, row + s, 4);
    corrections[c] = -kZeroPoint * total;
  }
}

}  // namespace

void pack_int8(const Weight& w, int8_t* packed, int32_t* corrections, int threads) {
  const Direction d = direction_of(w, false);
  const Layout layout(d);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < d.tiles_out; ++i) {
    const int64_t live = d.count[2 * i + 1], before = tiles_before(d, i) * layout.blocks;
    const int32_t* tiles = d.tiles + i * d.tiles_in + d.count[2 * i];
    for (int64_t b = 0; b < layout.blocks; ++b)
      for (int64_t t = 0; t < live; ++t) {
        const int64_t at = before + b * live + t;
        int8_t* to = packed + at * layout.depth * layout.width;
        const int64_t n0 = i * d.tile_out + b * layout.width, k0 = tiles[t] * d.tile_in;
        const bool whole = (b + 1) * layout.width <= d.tile_out && n0 + layout.width <= d.out;
        if (!w.bits && whole && layout.depth == d.tile_in && k0 + d.tile_in <= d.in) {
          pack_complete_tile(w.payload + n0 * d.in + k0, d.in, layout, to, corrections + at * layout.width);
          continue;
        }
        std::memset(to, 0, static_cast<size_t>(layout.depth * layout.width));
        for (int64_t c = 0; c < layout.width; ++c) {
          const int64_t local = b * layout.width + c, n = i * d.tile_out + local;
          int32_t total = 0;
          if (local < d.tile_out && n < d.out)
            for (int64_t s = 0; s < std::min(d.tile_in, d.in - tiles[t] * d.tile_in); ++s) {
              const int64_t k = tiles[t] * d.tile_in + s;
              if (w.bits && !bits_at(w.bits + n * ((d.in + 31) / 32), k, 1)) continue;
              const int8_t value = w.payload[n * d.in + k];
              to[(s / 4 * layout.width + c) * 4 + s % 4] = value;
              total += value;
            }
          corrections[at * layout.width + c] = -kZeroPoint * total;
        }
      }
  }
}

void multiply_int8(const Matrix& x, const Weight& weight, const int8_t* packed, const int32_t* corrections,
                   const int32_t* input_permutation, const Output& y, bool accumulate, uint8_t* scratch,
                   float* row_scales, int threads) {
  static constexpr auto two = int8_kernels<2>(std::make_integer_sequence<int, kPanel>{});
  static constexpr auto one = int8_kernels<1>(std::make_integer_sequence<int, kPanel>{});
  const Direction d = direction_of(weight, false);
  const Layout layout(d);
  const Panels panels(x.rows, kPanel);
  const int64_t row_bytes = d.tiles_in * layout.depth;
  const int64_t group =
      std::clamp<int64_t>((int64_t{1} << 19) / std::max<int64_t>(1, row_bytes * kPanel), 1, 32);
  const int64_t groups = (panels.count + group - 1) / group;
  const int64_t wanted = std::max<int64_t>(4, (8 * threads + groups - 1) / std::max<int64_t>(1, groups));
  const int64_t runs = std::min(d.tiles_out, wanted);
  const float* data = static_cast<const float*>(x.data);
  float* const out = static_cast<float*>(y.data);
  const float* const bias = static_cast<const float*>(y.bias);
#pragma omp parallel num_threads(threads)
  {
    float* staged = new float[static_cast<size_t>(d.in + kLanes)];
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels.count; ++p)
      for (int r = 0; r < panels.size(p); ++r)
        quantise_row(data + (panels.first(p) + r) * x.stride, d, input_permutation, panels.size(p), r, staged,
                     scratch + panels.first(p) * row_bytes, row_scales + panels.first(p) + r);
    delete[] staged;
#pragma omp for schedule(dynamic, 1) collapse(2) nowait
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t run = 0; run < runs; ++run) {
        alignas(64) float sum[kPanel * kBlock];
        const int64_t i0 = d.tiles_out * run / runs, i1 = d.tiles_out * (run + 1) / runs;
        int64_t at = tiles_before(d, i0) * layout.blocks;
        for (int64_t i = i0; i < i1; ++i) {
          const int64_t live = d.count[2 * i + 1];
          const int32_t* tiles = d.tiles + i * d.tiles_in + d.count[2 * i];
          for (int64_t b = 0; b < layout.blocks; ++b, at += live) {
            const int64_t o0 = i * d.tile_out + b * layout.width;
            const int64_t columns = std::min({layout.width, (i + 1) * d.tile_out - o0, d.out - o0});
            if (columns <= 0) continue;
            for (int64_t p = g * group; p < std::min(panels.count, (g + 1) * group); ++p) {
              const int rows = panels.size(p);
              const uint8_t* xp = scratch + panels.first(p) * row_bytes;
              const int8_t* wp = packed + at * layout.depth * layout.width;
              int64_t c = 0;
              for (; c + 2 * kLanes <= layout.width; c += 2 * kLanes)
                two[rows - 1](xp, wp + c * 4, corrections + at * layout.width + c, layout.width, layout.depth,
                              tiles, live, weight.scale + i * d.tiles_in, sum + c);
              for (; c < layout.width; c += kLanes)
                one[rows - 1](xp, wp + c * 4, corrections + at * layout.width + c, layout.width, layout.depth,
                              tiles, live, weight.scale + i * d.tiles_in, sum + c);
              for (int r = 0; r < rows; ++r) {
                const int64_t row = panels.first(p) + r;
                for (int64_t c2 = 0; c2 < columns; ++c2) {
                  const int64_t o = y.permutation ? y.permutation[o0 + c2] : o0 + c2;
                  float* place = out + row * d.out + o;
                  const float base = accumulate ? *place : bias ? bias[o] : 0.0f;
                  *place = base + (live ? row_scales[row] * sum[r * layout.width + c2] : 0.0f);
                }
              }
            }
          }
        }
      }
  }
}

}  // namespace rlnas::RLNAS_ISA
