// Concatenation attention on raw pointers: y_i = scale * sum_j ReLU(a_i + b_j) g_j, exactly, in O(N log N + N E).
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace rlnas {

struct Sweep {
  int64_t batch, queries, keys, channels;
  double scale;
  const float *query, *key;  // [batch][queries], [batch][keys]
  const float* value;        // rows [batch][keys][channels]
  float* out;                // rows [batch][queries][channels]; null where not wanted
  // Where `weight`, rows as out, is given: slope[b][i] = scale * weight_i . sum over active j of value_j.
  const float* weight;
  float* slope;
  int threads;
};

RLNAS_DECLARE(void sweep(const Sweep& job));

}  // namespace rlnas
