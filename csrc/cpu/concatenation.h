// Concatenation attention on raw pointers: y_i = scale * sum_j ReLU(a_i + b_j) g_j, exactly, in O(N log N + N
// E).
#pragma once

#include "cpu/nonlocal_attention.h"

namespace rlnas {

struct SweepShape {
  int64_t batch, queries, keys, channels;
  double scale;
  int threads;
};

// query [B][N], key [B][M], value rows [B][M][E]; out, weight rows [B][N][E] and slope [B][N] may be null:
// out_i as above; slope_i = scale * weight_i . sum of the value_j whose key is active, the gradient to
// query_i.
RLNAS_DECLARE(void concatenation_sweep(const SweepShape& shape, const float* query, const float* key,
                                       const float* value, float* out, const float* weight, float* slope));
RLNAS_DECLARE(void concatenation_forward(const BlockShape& shape, const BlockWeights& weights, const View& x,
                                         const View& z, const BlockSaved& saved));
RLNAS_DECLARE(void concatenation_backward(const BlockShape& shape, const BlockWeights& weights, const View& x,
                                          const View& grad_z, const BlockSaved& saved, const View& grad_x,
                                          const BlockGradients& gradients));

}  // namespace rlnas
