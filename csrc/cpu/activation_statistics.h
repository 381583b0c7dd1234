// Statistics of activations, from some of their positions, on raw pointers.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace rlnas {

// Channel c at position p lies at data[c * channel_stride + places[p]].  Of every thin-th position the values
// go into the histogram.
struct LookedAt {
  const float* data;
  int64_t channels, channel_stride;
  const int64_t* places;
  int64_t positions;
  int64_t thin;
  int threads;
};

// Of rlnas_fast/placement/probe.py, which says what they mean.
constexpr int kBins = 64;
constexpr double kReach = 4.0;
struct ActivationStatistics {
  double mean, variance, entropy, sparsity, correlation;  // all NaN where an activation is NaN or infinite
};

// The same bits whatever the number of threads.
RLNAS_DECLARE(ActivationStatistics activation_statistics(const LookedAt& x));

}  // namespace rlnas
