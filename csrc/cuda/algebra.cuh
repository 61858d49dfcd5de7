// The algebra between the passes, on [C] and [N, C] in fp32, a launch or two for what takes PyTorch's operators ten.
#pragma once

#include "gpu.cuh"
#include "launch.h"
#include "operands.h"
#include "reductions.cuh"

namespace effnet_fast {

constexpr int kAlgebraThreads = 256;

// stats [5, C]. biased, unbiased: what m2 is multiplied by.
static __global__ void __launch_bounds__(kAlgebraThreads)
    batch_norm_stats_kernel(const float* __restrict__ mean, const float* __restrict__ m2,
                            const float* __restrict__ weight, const float* __restrict__ bias, float eps,
                            float biased, float unbiased, int channels, float* __restrict__ stats) {
  const int c = blockIdx.x * kAlgebraThreads + threadIdx.x;
  if (c >= channels) return;
  const int64_t stride = channels;
  const float rstd = 1.f / sqrtf(m2[c] * biased + eps), scale = weight[c] * rstd;
  float* out = stats + c;
  out[0] = scale;
  out[stride] = bias[c] - mean[c] * scale;
  out[2 * stride] = mean[c];
  out[3 * stride] = rstd;
  out[4 * stride] = m2[c] * unbiased;
}

template <int N>
struct Sums {
  float values[N];

  __device__ __forceinline__ Sums& operator+=(const Sums& other) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += other.values[i];
    return *this;
  }
};

constexpr int kNormGradLanes = 8;

// grads [4, C] from sums [kinds, N, C], kinds: 5 or 2.
static __global__ void __launch_bounds__(kAlgebraThreads)
    batch_norm_grad_kernel(const float* __restrict__ stats, const float* __restrict__ sums, int kinds,
                           const float* __restrict__ gate, const float* __restrict__ pooled_grad, float count,
                           int64_t images, int channels, float* __restrict__ grads) {
  EFFNET_FAST_SHARED(shared);
  Sums<2>* slices = reinterpret_cast<Sums<2>*>(shared);
  const int lane = threadIdx.x % kNormGradLanes, slice = threadIdx.x / kNormGradLanes;
  const int c = blockIdx.x * kNormGradLanes + lane;
  const int64_t plane = images * channels;
  const float *du = sums + (kinds == 5 ? plane : 0), *du_hat = du + (kinds == 5 ? 2 : 1) * plane;
  const float *slope = du + plane, *slope_hat = du_hat + plane;  // of the five
  Sums<2> total{};
  if (c < channels)
#pragma unroll 4
    for (int64_t n = slice; n < images; n += kAlgebraThreads / kNormGradLanes) {
      const int64_t at = n * channels + c;
      const float factor = gate ? gate[at] : 1.f;
      Sums<2> mine{du[at] * factor, du_hat[at] * factor};
      if (pooled_grad) mine += {pooled_grad[at] * slope[at], pooled_grad[at] * slope_hat[at]};
      total += mine;
    }
  slices[threadIdx.x] = total;
  add_slices(slices, kNormGradLanes);
  if (slice > 0 || c >= channels) return;
  const float sum = slices[lane].values[0], sum_hat = slices[lane].values[1];
  const int64_t stride = channels;
  const float scale = stats[c], rstd = stats[3 * stride + c];
  float* out = grads + c;
  out[0] = sum_hat;
  out[stride] = sum;
  out[2 * stride] = -scale * (sum / count);
  out[3 * stride] = -scale * rstd * (sum_hat / count);
}

// Squeeze-excite's MLP, of which a block takes one image: enough threads for the loads of a few hundred kilobytes of
// weights. Shared memory: a product's sums and, behind them, one float for each squeezed channel.
constexpr int kSqueezeThreads = 1024, kSqueezeLanes = 32, kRowLanes = 8;
constexpr int kProductFloats = kSqueezeThreads / kRowLanes * (kRowLanes + 1);

// done(row, product) for the products of weights [rows, depth] with a vector, kLanes threads a row.
template <int kLanes, class Done>
__device__ __forceinline__ void multiply_rows(const float* __restrict__ weights, const float* vector, int rows,
                                              int depth, float* shared, const Done& done) {
  constexpr int kRows = kSqueezeThreads / kLanes, kPitch = kLanes + 1;  // + 1: a bank for each row
  static_assert(kRows * kPitch <= kProductFloats);
  const int lane = threadIdx.x % kLanes, mine = threadIdx.x / kLanes;
  for (int row = 0; row < rows; row += kRows) {
    float sum = 0;
    if (row + mine < rows)
#pragma unroll 8
      for (int k = lane; k < depth; k += kLanes) sum += weights[(int64_t)(row + mine) * depth + k] * vector[k];
    shared[mine * kPitch + lane] = sum;
    __syncthreads();
    const int other = row + (int)threadIdx.x;
    if (threadIdx.x < kRows && other < rows) {
      float total = 0;
#pragma unroll
      for (int i = 0; i < kLanes; ++i) total += shared[threadIdx.x * kPitch + i];
      done(other, total);
    }
    __syncthreads();
  }
}

// done(column, product) for the products of a vector, value(row), with weights [rows, columns].
template <int kLanes, class Value, class Done>
__device__ __forceinline__ void multiply_columns(const float* __restrict__ weights, int rows, int columns,
                                                 float* shared, const Value& value, const Done& done) {
  const int lane = threadIdx.x % kLanes, slice = threadIdx.x / kLanes;
  for (int first = 0; first < columns; first += kLanes) {
    const int column = first + lane;
    float sum = 0;
    if (column < columns)
#pragma unroll 8
      for (int row = slice; row < rows; row += kSqueezeThreads / kLanes)
        sum += value(row) * weights[(int64_t)row * columns + column];
    shared[threadIdx.x] = sum;
    add_slices(shared, kLanes);
    if (slice == 0 && column < columns) done(column, shared[lane]);
  }
}

// squeeze [2, N, C] from sums [N, C] over `pixels`.
static __global__ void __launch_bounds__(kSqueezeThreads)
    squeeze_gate_kernel(const float* __restrict__ sums, float pixels, SqueezeWeights mlp, int64_t images,
                        float* __restrict__ squeeze) {
  EFFNET_FAST_SHARED(shared);
  float* hidden = shared + kProductFloats;
  const float* pooled = sums + blockIdx.x * (int64_t)mlp.channels;
  float *means = squeeze + blockIdx.x * (int64_t)mlp.channels, *gate = means + images * mlp.channels;
  for (int c = threadIdx.x; c < mlp.channels; c += kSqueezeThreads) means[c] = pooled[c] / pixels;
  multiply_rows<kSqueezeLanes>(mlp.reduce, pooled, mlp.squeezed, mlp.channels, shared, [&](int r, float product) {
    const float u = product / pixels + mlp.reduce_bias[r];
    hidden[r] = u * sigmoid(u);
  });
  multiply_rows<kRowLanes>(mlp.expand, hidden, mlp.channels, mlp.squeezed, shared, [&](int c, float product) {
    gate[c] = sigmoid(product + mlp.expand_bias[c]);
  });
}

// The gradient of what the gate is a sigmoid of.
__device__ __forceinline__ float before_sigmoid(float grad, float gate) { return grad * gate * (1.f - gate); }

// pooled_grad [N, C], and [N, squeezed] each of the hidden values and of the gradient before their SiLU.
static __global__ void __launch_bounds__(kSqueezeThreads)
    squeeze_gate_backward_kernel(const float* __restrict__ squeeze, const float* __restrict__ dgate, float pixels,
                                 SqueezeWeights mlp, int64_t images, float* __restrict__ pooled_grad,
                                 float* __restrict__ hidden, float* __restrict__ dreduced) {
  EFFNET_FAST_SHARED(shared);
  float* mine = shared + kProductFloats;  // the slope of SiLU, then the gradient before it
  const int64_t at = blockIdx.x * (int64_t)mlp.channels, squeezed_at = blockIdx.x * (int64_t)mlp.squeezed;
  const float *means = squeeze + at, *gate = means + images * mlp.channels;
  multiply_rows<kSqueezeLanes>(mlp.reduce, means, mlp.squeezed, mlp.channels, shared, [&](int r, float product) {
    const float u = product + mlp.reduce_bias[r], sig = sigmoid(u), z = u * sig;
    hidden[squeezed_at + r] = z;
    mine[r] = silu_slope(sig, z);
  });
  multiply_columns<kSqueezeLanes>(
      mlp.expand, mlp.channels, mlp.squeezed, shared, [&](int c) { return before_sigmoid(dgate[at + c], gate[c]); },
      [&](int r, float product) {
        mine[r] *= product;
        dreduced[squeezed_at + r] = mine[r];
      });
  __syncthreads();
  multiply_columns<kAlgebraThreads>(
      mlp.reduce, mlp.squeezed, mlp.channels, shared, [&](int r) { return mine[r]; },
      [&](int c, float product) { pooled_grad[at + c] = product / pixels; });
}

constexpr int kGradChannels = 32, kGradSqueezed = 8;  // of a block's tile, in slices of images

// The gradients of the MLP's weights: sums over the images.
static __global__ void __launch_bounds__(kSqueezeThreads)
    squeeze_weights_grad_kernel(const float* __restrict__ squeeze, const float* __restrict__ dgate,
                                const float* __restrict__ hidden, const float* __restrict__ dreduced, int64_t images,
                                int channels, int squeezed, SqueezeGrads grads) {
  EFFNET_FAST_SHARED(shared);
  constexpr int kTile = kGradChannels * kGradSqueezed;
  Sums<4>* slices = reinterpret_cast<Sums<4>*>(shared);
  const int tiles = ceil_div(channels, kGradChannels), lane = threadIdx.x % kTile, slice = threadIdx.x / kTile;
  const int c = blockIdx.x % tiles * kGradChannels + lane % kGradChannels;
  const int r = blockIdx.x / tiles * kGradSqueezed + lane / kGradChannels;
  const float* gate = squeeze + images * channels;
  Sums<4> total{};  // of reduce, its bias, expand and its bias
  if (c < channels && r < squeezed)
#pragma unroll 4
    for (int64_t n = slice; n < images; n += kSqueezeThreads / kTile) {
      const int64_t at = n * channels + c, squeezed_at = n * squeezed + r;
      const float dexpanded = before_sigmoid(dgate[at], gate[at]), dr = dreduced[squeezed_at];
      total += {dr * squeeze[at], dr, dexpanded * hidden[squeezed_at], dexpanded};
    }
  slices[threadIdx.x] = total;
  add_slices(slices, kTile);
  if (slice > 0 || c >= channels || r >= squeezed) return;
  total = slices[lane];
  grads.reduce[(int64_t)r * channels + c] = total.values[0];
  if (c == 0) grads.reduce_bias[r] = total.values[1];
  grads.expand[(int64_t)c * squeezed + r] = total.values[2];
  if (r == 0) grads.expand_bias[c] = total.values[3];
}

void Algebra::batch_norm_stats(const float* mean, const float* m2, const float* weight, const float* bias, float eps,
                               int64_t count, int channels, float* stats, const Launch& on) {
  const float biased = 1.f / (float)std::max<int64_t>(count, 1);
  const float unbiased = 1.f / (float)std::max<int64_t>(count - 1, 1);
  EFFNET_FAST_LAUNCH(batch_norm_stats_kernel, ceil_div(channels, kAlgebraThreads), kAlgebraThreads, 0, on.stream, mean,
                     m2, weight, bias, eps, biased, unbiased, channels, stats);
}

void Algebra::batch_norm_grad(const float* stats, const float* sums, int kinds, const float* gate,
                              const float* pooled_grad, int64_t count, int64_t images, int channels, float* grads,
                              const Launch& on) {
  EFFNET_FAST_LAUNCH(batch_norm_grad_kernel, ceil_div(channels, kNormGradLanes), kAlgebraThreads,
                     kAlgebraThreads * (int)sizeof(Sums<2>), on.stream, stats, sums, kinds, gate, pooled_grad,
                     (float)count, images, channels, grads);
}

inline int squeeze_shared_bytes(const SqueezeWeights& mlp) {
  return (kProductFloats + mlp.squeezed) * (int)sizeof(float);
}

void Algebra::squeeze_gate(const float* sums, int64_t pixels, const SqueezeWeights& mlp, int64_t images, float* squeeze,
                           const Launch& on) {
  if (images > 0)
    EFFNET_FAST_LAUNCH(squeeze_gate_kernel, images, kSqueezeThreads, squeeze_shared_bytes(mlp), on.stream, sums,
                       (float)pixels, mlp, images, squeeze);
}

void Algebra::squeeze_gate_grad(const float* squeeze, const float* dgate, int64_t pixels, const SqueezeWeights& mlp,
                                int64_t images, float* pooled_grad, const SqueezeGrads& grads, float* partials,
                                const Launch& on) {
  float *hidden = partials, *dreduced = partials + images * mlp.squeezed;
  if (images > 0)
    EFFNET_FAST_LAUNCH(squeeze_gate_backward_kernel, images, kSqueezeThreads, squeeze_shared_bytes(mlp), on.stream,
                       squeeze, dgate, (float)pixels, mlp, images, pooled_grad, hidden, dreduced);
  const int64_t tiles = (int64_t)ceil_div(mlp.channels, kGradChannels) * ceil_div(mlp.squeezed, kGradSqueezed);
  EFFNET_FAST_LAUNCH(squeeze_weights_grad_kernel, tiles, kSqueezeThreads, kSqueezeThreads * (int)sizeof(Sums<4>),
                     on.stream, squeeze, dgate, hidden, dreduced, images, mlp.channels, mlp.squeezed, grads);
}

}  // namespace effnet_fast
