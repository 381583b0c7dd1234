// ReLU(a_i + b_j) is linear in a_i once it is known which keys are active.  Keys in falling and queries in rising
// order meet in one sweep: each key joins two running sums once, and no N x M or N x E table is kept.
// A tie is inactive, as ReLU's derivative at 0 is 0 in PyTorch.
#include "cpu/concatenation.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>


namespace rlnas::RLNAS_ISA {
namespace {

constexpr int64_t kChunk = 32;  // channels that share one sweep where there are fewer images than threads

// Position in the high half, a key that rises with x in the low half; NaN, of either sign, is the greatest.
uint64_t sort_key(float x, int64_t index, bool falling) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = x != x ? 0xffffffffu : bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(index) << 32 | (falling ? ~bits : bits);
}

// Indices of x in rising or falling order: a stable radix sort, one byte a pass.
void sort_indices(const float* x, int64_t count, bool falling, std::vector<uint64_t>& keys,
                  std::vector<uint64_t>& spare) {
  keys.resize(count);
  spare.resize(count);
  int64_t starts[4][256] = {};
  for (int64_t i = 0; i < count; i++) {
    keys[i] = sort_key(x[i], i, falling);
    for (int byte = 0; byte < 4; byte++) starts[byte][keys[i] >> 8 * byte & 255]++;
  }
  for (int byte = 0; byte < 4; byte++) {
    int64_t total = 0;
    for (int64_t& start : starts[byte]) {
      const int64_t here = start;
      start = total;
      total += here;
    }
    for (const uint64_t key : keys) spare[starts[byte][key >> 8 * byte & 255]++] = key;
    keys.swap(spare);
  }
}

struct Order {
  std::vector<uint64_t> queries, keys, spare;
};

// Channels [first, last) of one image; double sums, because a_i G + H may cancel.
void sweep_channels(const Sweep& job, int64_t b, int64_t first, int64_t last, const Order& order, float* slope) {
  const int64_t E = job.channels, width = last - first;
  const float *query = job.query + b * job.queries, *key = job.key + b * job.keys;
  const float* value = job.value + b * job.keys * E + first;
  std::vector<double> sums(2 * width, 0.0);
  double *__restrict plain = sums.data(), *__restrict scaled = plain + width;
  int64_t active = 0;
  for (const uint64_t packed : order.queries) {
    const int64_t i = static_cast<int64_t>(packed >> 32);
    const float a = query[i];
    for (; active < job.keys; active++) {
      const int64_t j = static_cast<int64_t>(order.keys[active] >> 32);
      if (key[j] <= -a) break;
      const double weight = key[j];
      const float* __restrict row = value + j * E;
      for (int64_t e = 0; e < width; e++) {
        plain[e] += row[e];
        scaled[e] += weight * row[e];
      }
    }
    if (job.out) {
      float* __restrict row = job.out + (b * job.queries + i) * E + first;
      const double slope_here = job.scale * a;
      for (int64_t e = 0; e < width; e++) row[e] = static_cast<float>(slope_here * plain[e] + job.scale * scaled[e]);
    }
    if (job.weight) {
      const float* __restrict row = job.weight + (b * job.queries + i) * E + first;
      double total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t e = 0; e < width; e++) total += plain[e] * row[e];
      slope[i] = static_cast<float>(job.scale * total);
    }
  }
}

}  // namespace

void sweep(const Sweep& job) {
  const bool split = job.batch < job.threads && job.channels > kChunk;
  const int64_t chunk = split ? kChunk : job.channels;
  const int64_t chunks = job.channels == 0 ? 0 : (job.channels + chunk - 1) / chunk;
  const int64_t slopes = job.weight ? job.batch * job.queries : 0;
  std::vector<float> partial(split ? slopes * chunks : 0);
#pragma omp parallel num_threads(job.threads)
  {
    Order order;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < job.batch * chunks; task++) {
      const int64_t b = task / chunks, part = task % chunks;
      sort_indices(job.query + b * job.queries, job.queries, false, order.queries, order.spare);
      sort_indices(job.key + b * job.keys, job.keys, true, order.keys, order.spare);
      float* slope = split ? partial.data() + part * slopes : job.slope;
      sweep_channels(job, b, part * chunk, std::min(job.channels, (part + 1) * chunk), order,
                     slope ? slope + b * job.queries : nullptr);
    }
    if (split) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < slopes; i++) {
        float total = 0;
        for (int64_t part = 0; part < chunks; part++) total += partial[part * slopes + i];
        job.slope[i] = total;
      }
    }
  }
}

}  // namespace rlnas::RLNAS_ISA
