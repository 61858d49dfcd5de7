// The passes that touch each element once: statistics, pooling, activation, and their backward; and the kernels that
// add up partial results in a fixed order.
#pragma once

#include "gpu.cuh"
#include "operands.h"
#include "plans.h"

namespace effnet_fast {

// The channels and pixels of a thread: pixels `first`, `first + rows`, ... before `end`, all of one image.
struct Share {
  int64_t image, first, end;
  int chunk, lane, row, c;
  int c0, channels;  // of the block
  bool active;

  __device__ Share(const Shape& s, const PixelPlan& plan) {
    const int64_t block = blockIdx.x;
    const int group = (int)(block % plan.groups);
    chunk = (int)(block / plan.groups % plan.chunks);
    image = block / plan.groups / plan.chunks;
    lane = threadIdx.x % plan.lanes;
    row = threadIdx.x / plan.lanes;
    c0 = group * plan.lanes * plan.vector;
    c = c0 + lane * plan.vector;
    channels = min(plan.lanes * plan.vector, s.c - c0);
    active = row < plan.rows && c < s.c;
    first = chunk * plan.chunk + row;
    end = min((chunk + 1) * plan.chunk, s.pixels());
  }
  // How many pixels some row of this block has.
  __device__ int count(int of_row, int rows) const {
    const int64_t left = end - (first - row + of_row);
    return left > 0 ? (int)((left + rows - 1) / rows) : 0;
  }
};

template <class T, int V>
__global__ void __launch_bounds__(PixelPlan::kThreads, 4)
    apply_kernel(const T* __restrict__ y, const T* __restrict__ residual, T* __restrict__ out, ApplyOperands op, Shape s,
                 PixelPlan plan) {
  const Share share(s, plan);
  if (!share.active) return;
  float scale[V], shift[V], gate[V];
  load_floats(op.scale + share.c, scale);
  load_floats(op.shift + share.c, shift);
#pragma unroll
  for (int i = 0; i < V; ++i) gate[i] = op.gate ? op.gate[share.image * s.c + share.c + i] : 1.f;
  const int64_t base = share.image * s.pixels() * s.c + share.c;
#pragma unroll 2
  for (int64_t p = share.first; p < share.end; p += plan.rows) {
    float value[V], added[V] = {};
    Packet<T, V>::load(y + base + p * s.c).unpack(value);
    if (residual) Packet<T, V>::load(residual + base + p * s.c).unpack(added);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float z = value[i] * scale[i] + shift[i];
      if (op.silu) z *= sigmoid(z);
      value[i] = z * gate[i] + added[i];
    }
    Packet<T, V>::pack(value).store(out + base + p * s.c);
  }
}

// With SiLU, seven operands of eight channels take 56 registers: two blocks, which still have two 16-byte loads a pixel
// in flight from every thread.
template <class T, int V, bool kSilu>
__global__ void __launch_bounds__(PixelPlan::kThreads, kSilu ? 2 : 4)
    backward_apply_kernel(const T* __restrict__ grad, const T* __restrict__ y, T* __restrict__ out, OutputGrad op, Shape s,
                          PixelPlan plan) {
  const Share share(s, plan);
  if (!share.active) return;
  float scale[V], shift[V], mean[V], a[V], b[V], gate[V], pooled[V];
  load_floats(op.scale + share.c, scale);
  load_floats(op.mean + share.c, mean);
  load_floats(op.a + share.c, a);
  load_floats(op.b + share.c, b);
  if (kSilu) load_floats(op.shift + share.c, shift);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    gate[i] = op.gate ? op.gate[share.image * s.c + share.c + i] : 1.f;
    pooled[i] = op.pooled_grad ? op.pooled_grad[share.image * s.c + share.c + i] : 0.f;
    if (!kSilu) {  // du * scale + a is linear in grad: fold what can be
      gate[i] *= scale[i];
      a[i] += pooled[i] * scale[i];
    }
  }
  const int64_t base = share.image * s.pixels() * s.c + share.c;
  for (int64_t p = share.first; p < share.end; p += plan.rows) {
    float du[V], value[V];
    Packet<T, V>::load(grad + base + p * s.c).unpack(du);
    Packet<T, V>::load(y + base + p * s.c).unpack(value);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float d = du[i] * gate[i];
      if constexpr (kSilu) {
        const float u = value[i] * scale[i] + shift[i], sig = sigmoid(u);
        d = (d + pooled[i]) * silu_slope(sig, u * sig) * scale[i];
      }
      value[i] = d + ((value[i] - mean[i]) * b[i] + a[i]);
    }
    Packet<T, V>::pack(value).store(out + base + p * s.c);
  }
}

// Adds up, row after row, what the rows of a block hold for each of its channels: done(channel of the block, total) on
// one thread per channel. `shared`: as many floats as the block has threads, times V.
template <int V, class Done>
__device__ __forceinline__ void sum_rows(const float (&mine)[V], float* shared, const Share& share, const PixelPlan& plan,
                                         const Done& done) {
  const int width = plan.lanes * V;
  if (share.row < plan.rows)
#pragma unroll
    for (int i = 0; i < V; ++i) shared[share.row * width + share.lane * V + i] = mine[i];
  __syncthreads();
  for (int k = threadIdx.x; k < share.channels; k += blockDim.x) {
    float total = 0;
    for (int row = 0; row < plan.rows; ++row) total += shared[row * width + k];
    done(k, total);
  }
  __syncthreads();  // the next sum overwrites
}

// partials [chunks, N, C]: sums over a chunk of SiLU(u) or u; the result itself where there is one chunk.
template <class T, int V>
__global__ void __launch_bounds__(PixelPlan::kThreads, 4)
    pool_kernel(const T* __restrict__ y, const float* __restrict__ scale_, const float* __restrict__ shift_, bool silu,
                float* __restrict__ partials, Shape s, PixelPlan plan) {
  EFFNET_FAST_SHARED(shared);
  const Share share(s, plan);
  float sum[V] = {};
  if (share.active) {
    float scale[V], shift[V];
    load_floats(scale_ + share.c, scale);
    load_floats(shift_ + share.c, shift);
    const int64_t base = share.image * s.pixels() * s.c + share.c;
#pragma unroll 4
    for (int64_t p = share.first; p < share.end; p += plan.rows) {
      float value[V];
      Packet<T, V>::load(y + base + p * s.c).unpack(value);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float u = value[i] * scale[i] + shift[i];
        sum[i] += silu ? u * sigmoid(u) : u;
      }
    }
  }
  float* out = partials + (share.chunk * s.n + share.image) * s.c + share.c0;
  sum_rows(sum, shared, share, plan, [&](int k, float total) { out[k] = total; });
}

// partials [chunks, 5 or 2, N, C]: with SiLU grad * SiLU(u), grad * d, d, grad * d * hat, d * hat; else grad, grad * hat.
// The five sums of eight channels take 40 registers and their operands 24: two blocks, but with four 16-byte loads of
// every thread in flight.
template <class T, int V, bool kSilu>
__global__ void __launch_bounds__(PixelPlan::kThreads, kSilu ? 2 : 4)
    backward_sums_kernel(const T* __restrict__ grad, const T* __restrict__ y, Normalization norm,
                         float* __restrict__ partials, Shape s, PixelPlan plan) {
  constexpr int kSums = kSilu ? 5 : 2;
  EFFNET_FAST_SHARED(shared);
  const Share share(s, plan);
  float sums[kSums][V] = {};
  if (share.active) {
    float scale[V] = {}, shift[V] = {}, mean[V], rstd[V];
    load_floats(norm.mean + share.c, mean);
    if (kSilu) {
      load_floats(norm.scale + share.c, scale);
      load_floats(norm.shift + share.c, shift);
    }
    const int64_t base = share.image * s.pixels() * s.c + share.c;
#pragma unroll 2
    for (int64_t p = share.first; p < share.end; p += plan.rows) {
      float dz[V], value[V];
      Packet<T, V>::load(grad + base + p * s.c).unpack(dz);
      Packet<T, V>::load(y + base + p * s.c).unpack(value);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float centered = value[i] - mean[i];
        if constexpr (kSilu) {
          const float u = value[i] * scale[i] + shift[i], sig = sigmoid(u), z = u * sig;
          const float slope = silu_slope(sig, z), du = dz[i] * slope;
          sums[0][i] += dz[i] * z;
          sums[1][i] += du;
          sums[2][i] += slope;
          sums[3][i] += du * centered;
          sums[4][i] += slope * centered;
        } else {
          sums[0][i] += dz[i];
          sums[1][i] += dz[i] * centered;
        }
      }
    }
    load_floats(norm.rstd + share.c, rstd);
#pragma unroll
    for (int i = 0; i < V; ++i)
#pragma unroll
      for (int sum = kSilu ? 3 : 1; sum < kSums; ++sum) sums[sum][i] *= rstd[i];  // hat = centered * rstd
  }
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    float* out = partials + ((share.chunk * kSums + i) * s.n + share.image) * s.c + share.c0;
    sum_rows(sums[i], shared, share, plan, [&](int k, float total) { out[k] = total; });
  }
}

// partials [chunks * N, 4, C]: of a chunk its count, a value, the mean's distance from that value, and m2.
template <class T, int V>
__global__ void __launch_bounds__(PixelPlan::kThreads, 4)
    channel_stats_kernel(const T* __restrict__ x, float* __restrict__ partials, Shape s, PixelPlan plan) {
  EFFNET_FAST_SHARED(shared);
  const Share share(s, plan);
  const int width = plan.lanes * V;
  float *firsts = shared, *means = firsts + plan.rows * width, *m2s = means + plan.rows * width;
  if (share.active) {
    ShiftedSums sums[V];
    const int64_t base = share.image * s.pixels() * s.c + share.c;
#pragma unroll 4
    for (int64_t p = share.first; p < share.end; p += plan.rows) {
      float value[V];
      Packet<T, V>::load(x + base + p * s.c).unpack(value);
#pragma unroll
      for (int i = 0; i < V; ++i) sums[i].add(value[i], p == share.first);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Moments<float> moments = sums[i].moments(share.count(share.row, plan.rows));
      const int at = share.row * width + share.lane * V + i;
      firsts[at] = sums[i].first;
      means[at] = moments.mean;
      m2s[at] = moments.m2;
    }
  }
  __syncthreads();
  float* out = partials + (share.image * plan.chunks + share.chunk) * 4 * s.c + share.c0;
  for (int k = threadIdx.x; k < share.channels; k += blockDim.x) {
    Moments<float> total{0, 0, 0};
    for (int at = k, row = 0; row < plan.rows; ++row, at += width)
      total.merge({(float)share.count(row, plan.rows), firsts[at] - firsts[k] + means[at], m2s[at]});
    out[k] = total.count;
    out[s.c + k] = firsts[k];
    out[2 * s.c + k] = total.mean;
    out[3 * s.c + k] = total.m2;
  }
}

// The last step of every reduction: a block adds up 32 values, each in 8 threads that take every eighth part.
constexpr int kFinalValues = 32, kFinalThreads = 8;

// out: sums of partials [parts, values] over parts; values [rows, columns] are written transposed if `transpose`.
static __global__ void sum_parts_kernel(const float* __restrict__ partials, int64_t parts, int64_t rows, int64_t columns,
                                        bool transpose, float* __restrict__ out) {
  EFFNET_FAST_SHARED(shared);
  const int lane = threadIdx.x % kFinalValues, slice = threadIdx.x / kFinalValues;
  const int64_t value = (int64_t)blockIdx.x * kFinalValues + lane, values = rows * columns;
  float total = 0;
  if (value < values)
#pragma unroll 4
    for (int64_t part = slice; part < parts; part += kFinalThreads) total += partials[part * values + value];
  shared[threadIdx.x] = total;
  __syncthreads();
  if (slice > 0 || value >= values) return;
  for (int i = 1; i < kFinalThreads; ++i) total += shared[i * kFinalValues + lane];
  out[transpose ? value % columns * rows + value / columns : value] = total;
}

// mean and m2 [channels] from partials [parts, 4, channels], in double.
static __global__ void merge_moments_kernel(const float* __restrict__ partials, int64_t parts, int channels,
                                            float* __restrict__ mean, float* __restrict__ m2) {
  EFFNET_FAST_SHARED(shared);
  Moments<double>* slices = reinterpret_cast<Moments<double>*>(shared);
  const int lane = threadIdx.x % kFinalValues, slice = threadIdx.x / kFinalValues;
  const int c = blockIdx.x * kFinalValues + lane;
  Moments<double> total{0, 0, 0};
  if (c < channels)
    for (int64_t part = slice; part < parts; part += kFinalThreads) {
      const float* from = partials + part * 4 * channels + c;
      total.merge({from[0], (double)from[channels] + from[2 * (int64_t)channels], from[3 * (int64_t)channels]});
    }
  slices[threadIdx.x] = total;
  __syncthreads();
  if (slice > 0 || c >= channels) return;
  for (int i = 1; i < kFinalThreads; ++i) total.merge(slices[i * kFinalValues + lane]);
  mean[c] = (float)total.mean;
  m2[c] = (float)total.m2;
}

}  // namespace effnet_fast
