// Softmax non-local attention with exact float32 products: online softmax forward, recomputing backward.
//
// A block of 16 x 16 threads owns 64 rows (queries, or keys in the key pass) and visits 64 columns at a time.
// Two products make everything: rows against columns over channels, and a 64 x 64 tile of weights against
// rows of channels.  Channels beyond WIDE are separate blocks; nothing of size N x M leaves the chip; no
// atomics.  Triton's own fp32 products spill without tensor cores, so this is the GPU's exact path.
//
// Source: Dao, FlashAttention-2 (2023), algorithm 2; gradients by hand.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

constexpr int kTile = 64;      // rows of a block and columns of a step
constexpr int kDepth = 16;     // how much of a sum is in shared memory at once
constexpr int kThreads = 256;  // 16 x 16, each with 4 rows
constexpr int kPitch = kTile + 4;
constexpr float kLog2e = 1.4426950408889634f;

// [sample, channel, position] with any strides.
template <typename T>
struct Tensor {
  T* data;
  int64_t sample, channel, position;

  __device__ Tensor at(int64_t index) const { return {data + index * sample, sample, channel, position}; }
  __device__ T* ref(int64_t c, int64_t p) const { return data + c * channel + p * position; }
};

struct Sizes {
  int depth, width, queries, keys;
};

struct Shared {
  float weights[kTile][kPitch];  // [column][row]
  union {
    struct {
      float left[kDepth][kPitch], right[kDepth][kPitch];
    };
    float wide[kDepth * 256];
  };
};

__device__ float to_float(float value) { return value; }
__device__ float to_float(__half value) { return __half2float(value); }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ void assign(float* target, float value) { *target = value; }
__device__ void assign(__half* target, float value) { *target = __float2half(value); }
__device__ void assign(__nv_bfloat16* target, float value) { *target = __float2bfloat16(value); }

__device__ int lane_row() { return threadIdx.x / 16 * 4; }
__device__ int lane_column() { return threadIdx.x % 16 * 4; }

// The 16 threads of a row are half a warp.
template <typename Combine>
__device__ float across_row(float value, Combine combine) {
#pragma unroll
  for (int distance = 8; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

__device__ float row_sum(float value) {
  return across_row(value, [](float a, float b) { return a + b; });
}

__device__ float row_max(float value) {
  return across_row(value, [](float a, float b) { return fmaxf(a, b); });
}

// Brings [COUNT positions x kDepth channels], or transposed roles, into target[depth * pitch + lane], zeros
// outside.  Neighbouring threads follow whichever stride is 1.
template <int COUNT, bool DEPTH_IS_CHANNEL, typename T>
__device__ void fetch(float* target, int pitch, Tensor<T> source, int first_lane, int lanes, int first_depth,
                      int depths) {
  const bool depth_inner = (DEPTH_IS_CHANNEL ? source.channel : source.position) == 1;
#pragma unroll
  for (int index = threadIdx.x; index < COUNT * kDepth; index += kThreads) {
    const int lane = depth_inner ? index / kDepth : index % COUNT;
    const int depth = depth_inner ? index % kDepth : index / COUNT;
    const int l = first_lane + lane, d = first_depth + depth;
    const bool inside = l < lanes && d < depths;
    target[depth * pitch + lane] =
        inside ? to_float(DEPTH_IS_CHANNEL ? *source.ref(d, l) : *source.ref(l, d)) : 0.0f;
  }
}

// sum[i][j] = rows[row + i] . columns[column + j] over all channels.
template <typename T>
__device__ void scores(float (&sum)[4][4], Shared& shared, Tensor<T> rows, int first_row, int row_count,
                       Tensor<T> columns, int first_column, int column_count, int channels) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[i][j] = 0.0f;
  }
  for (int start = 0; start < channels; start += kDepth) {
    __syncthreads();
    fetch<kTile, true>(&shared.left[0][0], kPitch, rows, first_row, row_count, start, channels);
    fetch<kTile, true>(&shared.right[0][0], kPitch, columns, first_column, column_count, start, channels);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const float4 a = *reinterpret_cast<const float4*>(&shared.left[k][lane_row()]);
      const float4 b = *reinterpret_cast<const float4*>(&shared.right[k][lane_column()]);
      const float left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(left[i], right[j], sum[i][j]);
      }
    }
  }
}

// Publishes a thread's part of the weights, [row][column], to the block.
__device__ void publish(Shared& shared, const float (&weights)[4][4]) {
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    *reinterpret_cast<float4*>(&shared.weights[lane_column() + j][lane_row()]) =
        make_float4(weights[0][j], weights[1][j], weights[2][j], weights[3][j]);
  }
}

// sum[row][channel] += weights[row][column] * values[channel][column] over the columns of this step.
template <int WIDE, typename T>
__device__ void mix(float (&sum)[4][WIDE / 16], Shared& shared, Tensor<T> values, int first_channel,
                    int channels, int first_column, int column_count) {
  for (int start = 0; start < kTile; start += kDepth) {
    __syncthreads();
    fetch<WIDE, false>(shared.wide, WIDE, values, first_channel, channels, first_column + start,
                       column_count);
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
      const float4 a = *reinterpret_cast<const float4*>(&shared.weights[start + k][lane_row()]);
      const float left[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
      for (int part = 0; part < WIDE / 64; ++part) {
        const float4 b = *reinterpret_cast<const float4*>(&shared.wide[k * WIDE + part * 64 + lane_column()]);
        const float right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][part * 4 + j] = fmaf(left[i], right[j], sum[i][part * 4 + j]);
        }
      }
    }
  }
}

template <int WIDE, typename T>
__device__ void store(Tensor<T> target, const float (&sum)[4][WIDE / 16], const float (&scale)[4],
                      int first_channel, int channels, int first_row, int row_count) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = first_row + lane_row() + i;
#pragma unroll
    for (int j = 0; j < WIDE / 16; ++j) {
      const int channel = first_channel + j / 4 * 64 + lane_column() + j % 4;
      if (row < row_count && channel < channels) assign(target.ref(channel, row), sum[i][j] * scale[i]);
    }
  }
}

// A block's place: tiles of one sample are neighbours, so that they share its columns in the cache.
struct Place {
  int64_t sample;
  int row;
  __device__ explicit Place(int rows) {
    const int tiles = (rows + kTile - 1) / kTile;
    sample = blockIdx.x / tiles;
    row = blockIdx.x % tiles * kTile;
  }
};

template <typename T, int WIDE>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Sizes n, Tensor<const T> theta, Tensor<const T> phi, Tensor<const T> g, Tensor<T> y,
                   float* lse) {
  __shared__ __align__(16) Shared shared;
  const Place place(n.queries);
  const auto query = theta.at(place.sample), key = phi.at(place.sample), value = g.at(place.sample);
  const int first_channel = blockIdx.y * WIDE;
  float sum[4][WIDE / 16] = {}, peak[4], total[4] = {}, tile[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) peak[i] = -INFINITY;
  for (int start = 0; start < n.keys; start += kTile) {
    scores(tile, shared, query, place.row, n.queries, key, start, n.keys, n.depth);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float largest = -INFINITY;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        tile[i][j] = start + lane_column() + j < n.keys ? tile[i][j] * kLog2e : -INFINITY;
        largest = fmaxf(largest, tile[i][j]);
      }
      const float new_peak = fmaxf(peak[i], row_max(largest));
      const float shift = new_peak == -INFINITY ? 0.0f : new_peak;  // a tile of -inf alone must not make NaN
      const float decay = exp2f(peak[i] - shift);
      float part = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) part += tile[i][j] = exp2f(tile[i][j] - shift);
      total[i] = total[i] * decay + row_sum(part);
      peak[i] = new_peak;
#pragma unroll
      for (int j = 0; j < WIDE / 16; ++j) sum[i][j] *= decay;
    }
    publish(shared, tile);
    mix<WIDE>(sum, shared, value, first_channel, n.width, start, n.keys);
  }
  float scale[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    scale[i] = 1.0f / total[i];
    const int row = place.row + lane_row() + i;
    if (blockIdx.y == 0 && lane_column() == 0 && row < n.queries) {
      lse[place.sample * n.queries + row] = (peak[i] + log2f(total[i])) / kLog2e;
    }
  }
  store<WIDE>(y.at(place.sample), sum, scale, first_channel, n.width, place.row, n.queries);
}

// theta's gradient; also writes delta_i = grad_y_i . y_i, which the key pass needs.
template <typename T, int WIDE>
__global__ void __launch_bounds__(kThreads)
    query_gradient_kernel(Sizes n, Tensor<const T> theta, Tensor<const T> phi, Tensor<const T> g,
                          Tensor<const T> grad_y, Tensor<const T> y, const float* lse, float* delta,
                          Tensor<T> gtheta) {
  __shared__ __align__(16) Shared shared;
  const Place place(n.queries);
  const auto query = theta.at(place.sample), key = phi.at(place.sample), value = g.at(place.sample);
  const auto grad = grad_y.at(place.sample), output = y.at(place.sample);
  const int first_channel = blockIdx.y * WIDE;
  float sum[4][WIDE / 16] = {}, log_sum[4], mean[4], weights[4][4], tile[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = place.row + lane_row() + i;
    log_sum[i] = row < n.queries ? lse[place.sample * n.queries + row] * kLog2e : 0.0f;
    float part = 0.0f;
    for (int channel = threadIdx.x % 16; row < n.queries && channel < n.width; channel += 16) {
      part += to_float(*grad.ref(channel, row)) * to_float(*output.ref(channel, row));
    }
    mean[i] = row_sum(part);
    if (blockIdx.y == 0 && lane_column() == 0 && row < n.queries)
      delta[place.sample * n.queries + row] = mean[i];
  }
  for (int start = 0; start < n.keys; start += kTile) {
    scores(weights, shared, query, place.row, n.queries, key, start, n.keys, n.depth);
    scores(tile, shared, grad, place.row, n.queries, value, start, n.keys, n.width);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool inside = start + lane_column() + j < n.keys;
        tile[i][j] = inside ? exp2f(weights[i][j] * kLog2e - log_sum[i]) * (tile[i][j] - mean[i]) : 0.0f;
      }
    }
    publish(shared, tile);
    mix<WIDE>(sum, shared, key, first_channel, n.depth, start, n.keys);
  }
  const float scale[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  store<WIDE>(gtheta.at(place.sample), sum, scale, first_channel, n.depth, place.row, n.queries);
}

// The gradients of phi and g; a block's rows are keys.
template <typename T, int WIDE>
__global__ void __launch_bounds__(kThreads)
    key_gradient_kernel(Sizes n, Tensor<const T> theta, Tensor<const T> phi, Tensor<const T> g,
                        Tensor<const T> grad_y, const float* lse, const float* delta, Tensor<T> gphi,
                        Tensor<T> gg) {
  __shared__ __align__(16) Shared shared;
  const Place place(n.keys);
  const auto query = theta.at(place.sample), key = phi.at(place.sample), value = g.at(place.sample);
  const auto grad = grad_y.at(place.sample);
  const int first_channel = blockIdx.y * WIDE;
  float key_sum[4][WIDE / 16] = {}, value_sum[4][WIDE / 16] = {}, weights[4][4], tile[4][4];
  for (int start = 0; start < n.queries; start += kTile) {
    scores(weights, shared, key, place.row, n.keys, query, start, n.queries, n.depth);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = start + lane_column() + j;
      const float log_sum = column < n.queries ? lse[place.sample * n.queries + column] : INFINITY;
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[i][j] = exp2f((weights[i][j] - log_sum) * kLog2e);
    }
    publish(shared, weights);
    mix<WIDE>(value_sum, shared, grad, first_channel, n.width, start, n.queries);
    scores(tile, shared, value, place.row, n.keys, grad, start, n.queries, n.width);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = start + lane_column() + j;
      const float mean = column < n.queries ? delta[place.sample * n.queries + column] : 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) tile[i][j] = weights[i][j] * (tile[i][j] - mean);
    }
    publish(shared, tile);
    mix<WIDE>(key_sum, shared, query, first_channel, n.depth, start, n.queries);
  }
  const float scale[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  store<WIDE>(gphi.at(place.sample), key_sum, scale, first_channel, n.depth, place.row, n.keys);
  store<WIDE>(gg.at(place.sample), value_sum, scale, first_channel, n.width, place.row, n.keys);
}

using Strides = std::array<int64_t, 3>;

template <typename T>
Tensor<T> tensor(uintptr_t address, const Strides& strides) {
  return {reinterpret_cast<T*>(address), strides[0], strides[1], strides[2]};
}

dim3 grid(int64_t batch, int rows, int channels, int wide) {
  const int64_t blocks = batch * ((rows + kTile - 1) / kTile);
  if (blocks > INT32_MAX)
    throw std::invalid_argument("nonlocal_attention: more than 2^31 - 1 tiles of 64 positions");
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>((channels + wide - 1) / wide));
}

void check_launch(const char* kernel) {
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("nonlocal_attention: launch of ") + kernel +
                             " failed: " + cudaGetErrorString(status));
  }
}

// Calls body with a value of the element type that `dtype` names.
template <typename Body>
void for_dtype(const std::string& dtype, Body body) {
  if (dtype == "float32") return body(float{});
  if (dtype == "float16") return body(__half{});
  if (dtype == "bfloat16") return body(__nv_bfloat16{});
  throw std::invalid_argument("nonlocal_attention: dtype is " + dtype +
                              "; expected float32, float16 or bfloat16");
}

// Calls body with the narrowest of the given widths that covers `channels` in one block, or the last.
template <int... WIDTHS, typename Body>
void for_width(int channels, Body body) {
  constexpr int widths[] = {WIDTHS...}, last = widths[sizeof...(WIDTHS) - 1];
  bool done = false;
  ((!done && (channels <= WIDTHS || WIDTHS == last)
        ? (body(std::integral_constant<int, WIDTHS>{}), done = true)
        : false),
   ...);
}

void forward(const std::string& dtype, int64_t batch, std::array<int, 4> n, uintptr_t theta,
             const Strides& theta_strides, uintptr_t phi, const Strides& phi_strides, uintptr_t g,
             const Strides& g_strides, uintptr_t y, const Strides& y_strides, uintptr_t lse,
             uintptr_t stream) {
  const Sizes sizes{n[0], n[1], n[2], n[3]};
  for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    for_width<64, 128, 256>(sizes.width, [&](auto wide) {
      forward_kernel<T, wide.value><<<grid(batch, sizes.queries, sizes.width, wide), kThreads, 0,
                                      reinterpret_cast<cudaStream_t>(stream)>>>(
          sizes, tensor<const T>(theta, theta_strides), tensor<const T>(phi, phi_strides),
          tensor<const T>(g, g_strides), tensor<T>(y, y_strides), reinterpret_cast<float*>(lse));
    });
  });
  check_launch("forward");
}

void backward(const std::string& dtype, int64_t batch, std::array<int, 4> n, uintptr_t theta,
              const Strides& theta_strides, uintptr_t phi, const Strides& phi_strides, uintptr_t g,
              const Strides& g_strides, uintptr_t grad_y, const Strides& grad_strides, uintptr_t y,
              const Strides& y_strides, uintptr_t lse, uintptr_t delta, uintptr_t gtheta,
              const Strides& gtheta_strides, uintptr_t gphi, const Strides& gphi_strides, uintptr_t gg,
              const Strides& gg_strides, uintptr_t stream_handle) {
  const Sizes sizes{n[0], n[1], n[2], n[3]};
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto query = tensor<const T>(theta, theta_strides), key = tensor<const T>(phi, phi_strides);
    const auto value = tensor<const T>(g, g_strides), grad = tensor<const T>(grad_y, grad_strides);
    for_width<64, 128>(sizes.depth, [&](auto wide) {
      query_gradient_kernel<T, wide.value>
          <<<grid(batch, sizes.queries, sizes.depth, wide), kThreads, 0, stream>>>(
              sizes, query, key, value, grad, tensor<const T>(y, y_strides),
              reinterpret_cast<const float*>(lse), reinterpret_cast<float*>(delta),
              tensor<T>(gtheta, gtheta_strides));
    });
    check_launch("query gradient");
    const int channels = std::max(sizes.depth, sizes.width);
    for_width<64, 128>(channels, [&](auto wide) {
      key_gradient_kernel<T, wide.value><<<grid(batch, sizes.keys, channels, wide), kThreads, 0, stream>>>(
          sizes, query, key, value, grad, reinterpret_cast<const float*>(lse),
          reinterpret_cast<const float*>(delta), tensor<T>(gphi, gphi_strides), tensor<T>(gg, gg_strides));
    });
    check_launch("key gradient");
  });
}

}  // namespace

void register_nonlocal_attention(py::module_& module) {
  using release = py::call_guard<py::gil_scoped_release>;
  module.def("nonlocal_attention_forward", &forward, release());
  module.def("nonlocal_attention_backward", &backward, release());
}
