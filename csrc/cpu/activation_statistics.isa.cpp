// One pass over the positions: gathered tile by tile, each tile added to sums, products of channels and a
// count of what is not 0; then all five statistics from those, and from a histogram of some of the values.
#include "cpu/activation_statistics.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/scratch.h"

namespace rlnas::RLNAS_ISA {
namespace {

constexpr int64_t kTile = 256;              // positions whose values are held at once
constexpr int64_t kFewChannels = 256;       // up to which the memory of more chunks is no matter
enum { kSums, kSome, kRows, kTransposed };  // slots of scratch

struct Chunk {
  int64_t begin, end;      // positions
  float *sums, *products;  // [C] and [C][ld], of values less `shift`
  int64_t nonzero = 0;
};

// rows[c][t] = channel c at places[t].  What lies together is read together: where channels are planes, all
// planes of a sample before the next sample.
void read_tile(const LookedAt& x, const int64_t* places, int64_t count, float* rows) {
  for (int64_t first = 0, last; first < count; first = last) {
    for (last = first + 1; last < count; last++)
      if (x.channel_stride > 1 && places[last] - places[last - 1] >= x.channel_stride) break;
    for (int64_t c = 0; c < x.channels; c++) {
      const float* from = x.data + c * x.channel_stride;
      for (int64_t t = first; t < last; t++) rows[c * kTile + t] = from[places[t]];
    }
  }
}

void add_chunk(const LookedAt& x, const float* shift, int64_t ld, float* some, int64_t some_ld,
               Chunk& chunk) {
  const int64_t C = x.channels;
  float* rows = scratch<kRows>(C * kTile);
  float* transposed = scratch<kTransposed>(kTile * ld);
  std::memset(chunk.sums, 0, sizeof(float) * C);
  std::memset(chunk.products, 0, sizeof(float) * C * ld);
  std::memset(transposed, 0, sizeof(float) * kTile * ld);  // columns beyond C stay 0
  VecInt zeros = {};
  int64_t nonzero = 0;
  for (int64_t first = chunk.begin; first < chunk.end; first += kTile) {
    const int64_t count = std::min(kTile, chunk.end - first), *places = x.places + first;
    read_tile(x, places, count, rows);
    for (int64_t c = 0; c < C; c++) {
      float *row = rows + c * kTile, total = 0;
      for (int64_t p = ceil_divide(first, x.thin); p * x.thin < first + count; p++)
        some[c * some_ld + p] = row[p * x.thin - first];
      Vec sums = {};
      int64_t t = 0;
      for (; t + kWidth <= count; t += kWidth) {
        const Vec values = load(row + t), less = values - shift[c];
        zeros += (VecInt)(values == Vec{});  // -1 where true
        sums += less;
        store(row + t, less);
      }
      nonzero += t;
      for (; t < count; t++) {
        nonzero += row[t] != 0;
        total += row[t] -= shift[c];
      }
      chunk.sums[c] += total + sum(sums);
    }
    transpose(rows, kTile, C, count, transposed, ld);
    for (int64_t n = 0; n < C; n += kWidth) {  // the upper triangle, vector by vector
      float* to = chunk.products + n;
      gemm<Order::row_major>(std::min(C, n + kWidth), kWidth, count, {rows, kTile}, {transposed + n, ld},
                             {to, ld, to, ld});
    }
  }
  for (int i = 0; i < kWidth; i++) nonzero += zeros[i];
  chunk.nonzero = nonzero;
}

// Of values relative to `mean`, in bins of equal width; what is 0 has one of its own, whose share is known.
double entropy_of(const float* some, int64_t count, double mean, double deviation, double sparsity) {
  constexpr int kLanes = 4;  // equal values one after another would wait for one another
  int32_t counts[kLanes][kBins + 1] = {};
  const double scale = kBins / (2 * kReach) / std::max(deviation, 1e-12);
  const float factor = static_cast<float>(scale), offset = static_cast<float>(kBins / 2 - mean * scale);
  constexpr int64_t kBlock = 256;
  int32_t bins[kBlock];
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t block = std::min(kBlock, count - first);
    for (int64_t i = 0; i < block; i++) {
      const float value = some[first + i];
      float at = value * factor + offset;
      at = at < 0 ? 0 : at;
      at = at > kBins - 1 ? kBins - 1 : at;
      bins[i] = value == 0 ? kBins : static_cast<int32_t>(at);
    }
    for (int64_t i = 0; i < block; i++) counts[i % kLanes][bins[i]]++;
  }
  int64_t others = 0;
  for (int bin = 0; bin < kBins; bin++) {
    for (int lane = 1; lane < kLanes; lane++) counts[0][bin] += counts[lane][bin];
    others += counts[0][bin];
  }
  double entropy = sparsity > 0 ? -sparsity * std::log(sparsity) : 0;
  int in_use = sparsity > 0;
  for (int bin = 0; bin < kBins; bin++)
    if (counts[0][bin]) {
      const double share = (1 - sparsity) * counts[0][bin] / static_cast<double>(others);
      if (share > 0) entropy -= share * std::log(share);
      in_use++;
    }
  return entropy + (in_use - 1) / (2.0 * static_cast<double>(count));
}

// The products of one half, centred by the means of all: [C][C], the upper triangle.
void centre(const std::vector<double>& means, const std::vector<double>& sums, int64_t count,
            std::vector<double>& products) {
  const int64_t C = means.size();
  for (int64_t i = 0; i < C; i++)
    for (int64_t j = i; j < C; j++)
      products[i * C + j] += count * means[i] * means[j] - sums[i] * means[j] - means[i] * sums[j];
}

}  // namespace

ActivationStatistics activation_statistics(const LookedAt& x) {
  const int64_t C = x.channels, ld = ceil_divide(C, kWidth) * kWidth, half = x.positions / 2;
  const int64_t parts = C <= kFewChannels ? 4 : 1, some_ld = ceil_divide(x.positions, x.thin);
  float* some = scratch<kSome>(C * some_ld);
  float* space = scratch<kSums>(C + 2 * parts * C * (ld + 1));
  float* shift = space;  // near the mean, so that float32 squares lose nothing
  const int64_t near = std::min<int64_t>(64, x.positions);
  for (int64_t c = 0; c < C; c++) {
    float total = 0;
    for (int64_t p = 0; p < near; p++)
      total += x.data[c * x.channel_stride + x.places[p * (x.positions / near)]];
    shift[c] = total / near;
  }
  std::vector<Chunk> chunks;
  for (int64_t part = 0; part < 2 * parts; part++) {
    const int64_t start = part < parts ? 0 : half, length = part < parts ? half : x.positions - half;
    const int64_t at = part % parts;
    float* products = space + C + part * C * (ld + 1);
    chunks.push_back(
        {start + length * at / parts, start + length * (at + 1) / parts, products + C * ld, products});
  }
#pragma omp parallel for schedule(static) num_threads(std::min<int64_t>(x.threads, 2 * parts))
  for (int64_t part = 0; part < 2 * parts; part++) add_chunk(x, shift, ld, some, some_ld, chunks[part]);

  std::vector<double> means(C), sums[2], products[2];
  int64_t nonzero = 0;
  for (int which = 0; which < 2; which++) {
    sums[which].assign(C, 0.0), products[which].assign(C * C, 0.0);
    for (int64_t part = which * parts; part < (which + 1) * parts; part++) {
      nonzero += chunks[part].nonzero;
      for (int64_t i = 0; i < C; i++) {
        sums[which][i] += chunks[part].sums[i];
        for (int64_t j = i; j < C; j++) products[which][i * C + j] += chunks[part].products[i * ld + j];
      }
    }
  }
  const double n = static_cast<double>(x.positions);
  for (int64_t i = 0; i < C; i++) means[i] = (sums[0][i] + sums[1][i]) / n;
  centre(means, sums[0], half, products[0]);
  centre(means, sums[1], x.positions - half, products[1]);

  std::vector<double> scales(C);
  double mean = 0, variance = 0, apart = 0, square = 0;
  for (int64_t i = 0; i < C; i++) {
    const double own = (products[0][i * C + i] + products[1][i * C + i]) / n;
    scales[i] = own > 1e-12 ? 1 / own : 0;
    variance += own / C;
    mean += (means[i] + shift[i]) / C;
  }
  for (int64_t i = 0; i < C; i++) apart += std::pow(means[i] + shift[i] - mean, 2) / C;
  variance += apart;
  if (!std::isfinite(variance)) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    return {nan, nan, nan, nan, nan};
  }
  for (int64_t i = 0; i < C; i++)
    for (int64_t j = i + 1; j < C; j++)
      square += 2 * scales[i] * scales[j] * products[0][i * C + j] * products[1][i * C + j];
  const double pairs = static_cast<double>(half) * (x.positions - half) * C * (C - 1);
  const double correlation = pairs > 0 ? std::sqrt(std::max(square / pairs, 0.0)) : 0;
  const double sparsity = 1 - nonzero / (n * C);
  const double entropy = entropy_of(some, C * some_ld, mean, std::sqrt(variance), sparsity);
  return {mean, variance, entropy, sparsity, correlation};
}

}  // namespace rlnas::RLNAS_ISA
