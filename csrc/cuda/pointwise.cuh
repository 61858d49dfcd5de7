// The passes that touch each element once: statistics, pooling, activation, and their backward.
#pragma once

#include "gpu.cuh"
#include "operands.h"
#include "plans.h"

namespace effnet_fast {

// The channels and pixels of a thread: pixels `first`, `first + rows`, ... before `end`, all of one image; its block's
// begin at `begin`.
struct Share {
  int64_t image, begin, first, end;
  int chunk, lane, row, c;
  int c0, channels;  // of the block
  bool active;

  __device__ Share(const Shape& s, const PixelPlan& plan) {
    // divisions in 32 bits: those in 64 take a hundred cycles
    const unsigned block = blockIdx.x, groups = plan.groups, chunks = plan.chunks;
    const int group = (int)(block % groups);
    chunk = (int)(block / groups % chunks);
    image = block / groups / chunks;
    lane = (int)(threadIdx.x % (unsigned)plan.lanes);
    row = (int)(threadIdx.x / (unsigned)plan.lanes);
    c0 = group * plan.lanes * plan.vector;
    c = c0 + lane * plan.vector;
    channels = min(plan.lanes * plan.vector, s.c - c0);
    active = row < plan.rows && c < s.c;
    begin = chunk * plan.chunk;
    first = begin + row;
    end = min(begin + plan.chunk, s.pixels());
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
      if (op.silu) z *= sigmoid_of<T>(z);
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
        const float u = value[i] * scale[i] + shift[i], sig = sigmoid_of<T>(u);
        d = (d + pooled[i]) * silu_slope(sig, u * sig) * scale[i];
      }
      value[i] = d + ((value[i] - mean[i]) * b[i] + a[i]);
    }
    Packet<T, V>::pack(value).store(out + base + p * s.c);
  }
}

// Adds up what the rows of a block hold of each sum for each of its channels, in a fixed order: done(sum, channel of
// the block, total) on one thread each. `shared`: as many floats as the rows have. No barrier follows.
template <int kSums, int V, class Done>
__device__ __forceinline__ void sum_rows(const float (&mine)[kSums][V], float* shared, const Share& share,
                                         const PixelPlan& plan, const Done& done) {
  const int width = plan.lanes * V, columns = kSums * width, threads = (int)blockDim.x;
  if (share.row < plan.rows)
#pragma unroll
    for (int sum = 0; sum < kSums; ++sum) {
      float* to = shared + share.row * columns + sum * width + share.lane * V;
      if constexpr (V % 4 == 0) {  // single floats, V apart from one thread to the next, would meet in a few banks
#pragma unroll
        for (int i = 0; i < V; i += 4)
          store_shared(to + i, reinterpret_cast<const float(&)[4]>(mine[sum][i]));
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i) to[i] = mine[sum][i];
      }
    }
  __syncthreads();
  // few columns: rows in as many slices as keep all threads busy, of which each leaves its total in its first row
  const int slices = min(plan.rows, max(1, threads / columns));
  for (int i = threadIdx.x; i < slices * columns; i += threads) {
    float total = shared[i];
#pragma unroll 8
    for (int at = i + slices * columns; at < plan.rows * columns; at += slices * columns) total += shared[at];
    shared[i] = total;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < columns; i += threads) {
    const int sum = kSums == 1 ? 0 : i / width, k = i - sum * width;
    float total = shared[i];
    for (int slice = 1; slice < slices; ++slice) total += shared[slice * columns + i];
    if (k < share.channels) done(sum, k, total);
  }
}

// partials [chunks, N, C]: sums over a chunk of SiLU(u) or u; the result itself where there is one chunk.
template <class T, int V>
__global__ void __launch_bounds__(PixelPlan::kThreads, 4)
    pool_kernel(const T* __restrict__ y, const float* __restrict__ scale_, const float* __restrict__ shift_, bool silu,
                float* __restrict__ partials, Shape s, PixelPlan plan) {
  EFFNET_FAST_SHARED(shared);
  const Share share(s, plan);
  float sum[1][V] = {};
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
        sum[0][i] += silu ? u * sigmoid_of<T>(u) : u;
      }
    }
  }
  float* out = partials + (share.chunk * s.n + share.image) * s.c + share.c0;
  sum_rows(sum, shared, share, plan, [&](int, int k, float total) { out[k] = total; });
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
          const float u = value[i] * scale[i] + shift[i], sig = sigmoid_of<T>(u), z = u * sig;
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
  float* out = partials + (share.chunk * kSums * s.n + share.image) * s.c + share.c0;
  sum_rows(sums, shared, share, plan, [&](int sum, int k, float total) { out[sum * s.n * s.c + k] = total; });
}

// partials [chunks * N, 4, C]: of a chunk its count, a value, the mean's distance from that value, and m2.
template <class T, int V>
__global__ void __launch_bounds__(PixelPlan::kThreads, 4)
    channel_stats_kernel(const T* __restrict__ x, float* __restrict__ partials, Shape s, PixelPlan plan) {
  EFFNET_FAST_SHARED(shared);
  const Share share(s, plan);
  // the chunk's first values, then its means' distances from them
  float* origins = shared + plan.rows * plan.lanes * V;
  ShiftedSums sums[V];
  int count = 0;
  if (share.active) {
    const int64_t base = share.image * s.pixels() * s.c + share.c;
#pragma unroll 4
    for (int64_t p = share.first; p < share.end; p += plan.rows) {
      float value[V];
      Packet<T, V>::load(x + base + p * s.c).unpack(value);
#pragma unroll
      for (int i = 0; i < V; ++i) sums[i].add(value[i], p == share.first);
      ++count;
    }
  }
  if (share.row == 0)
#pragma unroll
    for (int i = 0; i < V; ++i) origins[share.lane * V + i] = sums[i].first;
  __syncthreads();
  // a thread's sums are of distances from its first value: they move by that value's distance from the chunk's first,
  // and then from the chunk's mean
  float moved[1][V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    sums[i].first -= origins[share.lane * V + i];
    moved[0][i] = count ? sums[i].sum + count * sums[i].first : 0.f;
  }
  float* out = partials + (share.image * plan.chunks + share.chunk) * 4 * s.c + share.c0;
  const float pixels = (float)(share.end - share.begin);
  sum_rows(moved, shared, share, plan, [&](int, int k, float total) {
    const float mean = total / pixels;
    out[k] = pixels;
    out[s.c + k] = origins[k];
    out[2 * s.c + k] = mean;
    origins[k] = mean;
  });
  __syncthreads();
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float d = sums[i].first - origins[share.lane * V + i];
    moved[0][i] = count ? sums[i].square + d * (2 * sums[i].sum + count * d) : 0.f;
  }
  sum_rows(moved, shared, share, plan, [&](int, int k, float total) { out[3 * s.c + k] = total; });
}

}  // namespace effnet_fast
