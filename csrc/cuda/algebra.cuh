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
    total = sum_strided<4>(slice, images, kAlgebraThreads / kNormGradLanes, [&](int64_t n) {
      const int64_t at = n * channels + c;
      const float factor = gate ? gate[at] : 1.f;
      Sums<2> mine{du[at] * factor, du_hat[at] * factor};
      if (pooled_grad) mine += {pooled_grad[at] * slope[at], pooled_grad[at] * slope_hat[at]};
      return mine;
    });
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

// Squeeze-excite's MLP: products of its weights with a vector of every image, a block for a few results, on all
// multiprocessors. One block an image waited for its loads: 28 us for 64 images of 1152 channels on an H200.
constexpr int kRowThreads = 256, kRowImages = 4, kColumnThreads = 1024;

// done(image, row, product) of weights [rows, depth] with vectors [images, depth]: kLanes threads a row, and a few
// images at a time, for which the weights are read once.
template <int kLanes, class Done>
__global__ void __launch_bounds__(kRowThreads)
    multiply_rows_kernel(const float* __restrict__ weights, const float* __restrict__ vectors, int64_t images, int rows,
                         int depth, Done done) {
  constexpr int kRows = kRowThreads / kLanes, kPitch = kLanes + 1;  // + 1: a bank for each sum
  EFFNET_FAST_SHARED(shared);
  const int tiles = ceil_div(rows, kRows), first_row = (int)blockIdx.x % tiles * kRows;
  const int64_t first_image = (int64_t)((int)blockIdx.x / tiles) * kRowImages;
  const int count = (int)min((int64_t)kRowImages, images - first_image);
  const int lane = threadIdx.x % kLanes, mine = threadIdx.x / kLanes;
  Sums<kRowImages> sums{};
  if (first_row + mine < rows) {
    const float *of_row = weights + (int64_t)(first_row + mine) * depth, *of_image = vectors + first_image * depth;
    sums = sum_strided<8>(lane, depth, kLanes, [&](int k) {
      Sums<kRowImages> terms{};
      const float weight = of_row[k];
#pragma unroll
      for (int i = 0; i < kRowImages; ++i)
        if (i < count) terms.values[i] = weight * of_image[i * (int64_t)depth + k];
      return terms;
    });
  }
#pragma unroll
  for (int i = 0; i < kRowImages; ++i) shared[(i * kRows + mine) * kPitch + lane] = sums.values[i];
  __syncthreads();
  const int row = first_row + (int)threadIdx.x % kRows, image = threadIdx.x / kRows;
  if (image >= count || row >= rows) return;
  float total = 0;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) total += shared[threadIdx.x * kPitch + i];
  done(first_image + image, row, total);
}

// done(image, column, product) of a vector of every image, value(image, row), with weights [rows, columns].
template <int kLanes, class Value, class Done>
__global__ void __launch_bounds__(kColumnThreads)
    multiply_columns_kernel(const float* __restrict__ weights, int rows, int columns, Value value, Done done) {
  EFFNET_FAST_SHARED(shared);
  const int lane = threadIdx.x % kLanes, slice = threadIdx.x / kLanes, tiles = ceil_div(columns, kLanes);
  const int column = (int)blockIdx.x % tiles * kLanes + lane;
  const int64_t image = (int)blockIdx.x / tiles;
  float sum = 0;
  if (column < columns)
    sum = sum_strided<8>(slice, rows, kColumnThreads / kLanes,
                         [&](int row) { return value(image, row) * weights[(int64_t)row * columns + column]; });
  shared[threadIdx.x] = sum;
  add_slices(shared, kLanes);
  if (slice == 0 && column < columns) done(image, column, shared[lane]);
}

// What the products are made of, and what is made of them.
struct StoreHidden {
  const float* bias;
  float pixels;  // that the vectors are sums over
  int squeezed;
  float *hidden, *slope;  // [N, squeezed]; slope: of SiLU, or null

  __device__ __forceinline__ void operator()(int64_t image, int r, float product) const {
    const float u = product / pixels + bias[r], sig = sigmoid(u), z = u * sig;
    hidden[image * squeezed + r] = z;
    if (slope) slope[image * squeezed + r] = silu_slope(sig, z);
  }
};
struct StoreGate {
  const float *bias, *sums;
  float pixels;
  int channels;
  float *means, *gate;  // [N, C]

  __device__ __forceinline__ void operator()(int64_t image, int c, float product) const {
    const int64_t at = image * channels + c;
    means[at] = sums[at] / pixels;
    gate[at] = sigmoid(product + bias[c]);
  }
};

// The gradient of what the gate is a sigmoid of.
__device__ __forceinline__ float before_sigmoid(float grad, float gate) { return grad * gate * (1.f - gate); }

struct ExpandedGrad {
  const float *dgate, *gate;
  int channels;

  __device__ __forceinline__ float operator()(int64_t image, int c) const {
    const int64_t at = image * channels + c;
    return before_sigmoid(dgate[at], gate[at]);
  }
};
struct MultiplyReduced {
  float* slope_to_grad;  // [N, squeezed]
  int squeezed;

  __device__ __forceinline__ void operator()(int64_t image, int r, float product) const {
    slope_to_grad[image * squeezed + r] *= product;
  }
};
struct ReducedGrad {
  const float* dreduced;
  int squeezed;

  __device__ __forceinline__ float operator()(int64_t image, int r) const { return dreduced[image * squeezed + r]; }
};
struct StorePooledGrad {
  float* pooled_grad;
  float pixels;
  int channels;

  __device__ __forceinline__ void operator()(int64_t image, int c, float product) const {
    pooled_grad[image * channels + c] = product / pixels;
  }
};

constexpr int kGradChannels = 32, kGradSqueezed = 8, kWeightsThreads = 1024;  // a block's tile, in slices of images

// The gradients of the MLP's weights: sums over the images.
static __global__ void __launch_bounds__(kWeightsThreads)
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
    total = sum_strided<4>(slice, images, kWeightsThreads / kTile, [&](int64_t n) {
      const int64_t at = n * channels + c, squeezed_at = n * squeezed + r;
      const float dexpanded = before_sigmoid(dgate[at], gate[at]), dr = dreduced[squeezed_at];
      return Sums<4>{dr * squeeze[at], dr, dexpanded * hidden[squeezed_at], dexpanded};
    });
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

template <int kLanes, class Done>
static void multiply_rows(const float* weights, const float* vectors, int64_t images, int rows, int depth,
                          const Done& done, const Launch& on) {
  constexpr int kRows = kRowThreads / kLanes;
  const auto kernel = multiply_rows_kernel<kLanes, Done>;
  const int64_t blocks = ceil_div(rows, kRows) * ceil_div<int64_t>(images, kRowImages);
  if (blocks > 0)
    EFFNET_FAST_LAUNCH(kernel, blocks, kRowThreads, kRowImages * kRows * (kLanes + 1) * (int)sizeof(float), on.stream,
                       weights, vectors, images, rows, depth, done);
}

template <int kLanes, class Value, class Done>
static void multiply_columns(const float* weights, int64_t images, int rows, int columns, const Value& value,
                             const Done& done, const Launch& on) {
  const auto kernel = multiply_columns_kernel<kLanes, Value, Done>;
  const int64_t blocks = ceil_div(columns, kLanes) * images;
  if (blocks > 0)
    EFFNET_FAST_LAUNCH(kernel, blocks, kColumnThreads, kColumnThreads * (int)sizeof(float), on.stream, weights, rows,
                       columns, value, done);
}

void Algebra::squeeze_gate(const float* sums, int64_t pixels, const SqueezeWeights& mlp, int64_t images, float* squeeze,
                           float* hidden, const Launch& on) {
  const float count = (float)pixels;
  multiply_rows<32>(mlp.reduce, sums, images, mlp.squeezed, mlp.channels,
                    StoreHidden{mlp.reduce_bias, count, mlp.squeezed, hidden, nullptr}, on);
  multiply_rows<8>(mlp.expand, hidden, images, mlp.channels, mlp.squeezed,
                   StoreGate{mlp.expand_bias, sums, count, mlp.channels, squeeze, squeeze + images * mlp.channels}, on);
}

void Algebra::squeeze_gate_grad(const float* squeeze, const float* dgate, int64_t pixels, const SqueezeWeights& mlp,
                                int64_t images, float* pooled_grad, const SqueezeGrads& grads, float* partials,
                                const Launch& on) {
  float *hidden = partials, *dreduced = partials + images * mlp.squeezed;
  multiply_rows<32>(mlp.reduce, squeeze, images, mlp.squeezed, mlp.channels,
                    StoreHidden{mlp.reduce_bias, 1, mlp.squeezed, hidden, dreduced}, on);
  multiply_columns<32>(mlp.expand, images, mlp.channels, mlp.squeezed,
                       ExpandedGrad{dgate, squeeze + images * mlp.channels, mlp.channels},
                       MultiplyReduced{dreduced, mlp.squeezed}, on);
  multiply_columns<128>(mlp.reduce, images, mlp.squeezed, mlp.channels, ReducedGrad{dreduced, mlp.squeezed},
                        StorePooledGrad{pooled_grad, (float)pixels, mlp.channels}, on);
  const int64_t tiles = (int64_t)ceil_div(mlp.channels, kGradChannels) * ceil_div(mlp.squeezed, kGradSqueezed);
  EFFNET_FAST_LAUNCH(squeeze_weights_grad_kernel, tiles, kWeightsThreads, kWeightsThreads * (int)sizeof(Sums<4>),
                     on.stream, squeeze, dgate, hidden, dreduced, images, mlp.channels, mlp.squeezed, grads);
}

}  // namespace effnet_fast
