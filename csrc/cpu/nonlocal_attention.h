// Softmax non-local attention on raw pointers: y_i = sum_j softmax_j(theta_i . phi_j) g_j, no 1/sqrt(d).
// Wang et al., Non-local Neural Networks (2018), eq. 2, 4, 6.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace rlnas {

enum class DType : int { float32, bfloat16, float16 };

// A tensor [batch][channels][depth][height][width], strides in elements; null data is an absent tensor.
struct View {
  void* data;
  DType dtype;
  int64_t batch, channel, space[3];
};

// Pooled keys: maximum over windows of `pool`, windows that do not fit are left out.
struct BlockShape {
  int64_t batch, channels, inner, value;  // C, D of theta and phi, E of g
  int64_t space[3], pool[3];
  bool residual, deterministic;
  int threads;
};

// Dense row-major weights [D][C], [D][C], [E][C], [C][E] and biases, all of one dtype; a null bias is 0. Null
// theta and phi are the identity (the Gaussian kind, D = C): x itself is compared.  `pair` [2D] is that of
// concatenation; where it is null, theta and phi hold it already and D is 1.
struct BlockWeights {
  DType dtype;
  const void *theta, *phi, *g, *out;
  const void *theta_bias, *phi_bias, *g_bias, *out_bias;
  const void* pair;
};

// What the backward needs, float32: projections [B][N][2D+E], or x and g [B][N][C+E] where x is compared;
// attention [B][N][E] and log-sum-exp [B][N] for softmax, sum_j g_j phi_j^T / M [B][E][D] in place of
// attention for dot product; for pooled keys the winning place within each window [B][M][D+E]; and, for
// softmax of up to kKept positions, the terms exp(logit - maximum) [B][M][kept_lanes(N)], beside which lse
// holds the inverse of their sums, or, for dot product, W_z times that sum [B][D][C].
struct BlockSaved {
  float *projections, *attention, *lse;
  uint8_t* winners;
  float* terms;
};

// Gradients, dtype and layouts as the weights; null where not wanted.
struct BlockGradients {
  void *theta, *phi, *g, *out, *theta_bias, *phi_bias, *g_bias, *out_bias, *pair;
};

struct AttentionShape {
  int64_t batch, queries, keys, inner, value;
  bool deterministic;
  int threads;
};

RLNAS_DECLARE(void block_forward(const BlockShape& shape, const BlockWeights& weights, const View& x,
                                 const View& z, const BlockSaved& saved));
RLNAS_DECLARE(void block_backward(const BlockShape& shape, const BlockWeights& weights, const View& x,
                                  const View& grad_z, const BlockSaved& saved, const View& grad_x,
                                  const BlockGradients& gradients));
// The softmax block where the CPU multiplies bfloat16 pairs; only where it says that it serves.  That depends
// on nothing but its arguments and the instruction set, so that forward and backward agree.
RLNAS_DECLARE(bool bf16_block_serves(const BlockShape& shape, const View& x));
RLNAS_DECLARE(void bf16_block_forward(const BlockShape& shape, const BlockWeights& weights, const View& x,
                                      const View& z, const BlockSaved& saved));
RLNAS_DECLARE(void bf16_block_backward(const BlockShape& shape, const BlockWeights& weights, const View& x,
                                       const View& grad_z, const BlockSaved& saved, const View& grad_x,
                                       const BlockGradients& gradients));
RLNAS_DECLARE(void dot_product_forward(const BlockShape& shape, const BlockWeights& weights, const View& x,
                                       const View& z, const BlockSaved& saved));
RLNAS_DECLARE(void dot_product_backward(const BlockShape& shape, const BlockWeights& weights, const View& x,
                                        const View& grad_z, const BlockSaved& saved, const View& grad_x,
                                        const BlockGradients& gradients));
// The same in bfloat16 pairs, as for the softmax block.
RLNAS_DECLARE(bool bf16_dot_product_serves(const BlockShape& shape, const View& x));
RLNAS_DECLARE(void bf16_dot_product_forward(const BlockShape& shape, const BlockWeights& weights,
                                            const View& x, const View& z, const BlockSaved& saved));
RLNAS_DECLARE(void bf16_dot_product_backward(const BlockShape& shape, const BlockWeights& weights,
                                             const View& x, const View& grad_z, const BlockSaved& saved,
                                             const View& grad_x, const BlockGradients& gradients));
RLNAS_DECLARE(void attention_forward(const AttentionShape& shape, const View& theta, const View& phi,
                                     const View& g, const View& y, float* lse));
RLNAS_DECLARE(void attention_backward(const AttentionShape& shape, const View& theta, const View& phi,
                                      const View& g, const View& y, const float* lse, const View& grad_y,
                                      const View& grad_theta, const View& grad_phi, const View& grad_g));

}  // namespace rlnas
