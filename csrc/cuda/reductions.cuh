// The last step of every reduction: partial results added up, in a fixed order.
#pragma once

#include "gpu.cuh"
#include "launch.h"

namespace effnet_fast {

// A block's threads stand in slices of lanes, thread slice * lanes + lane; slices: a power of two. Adds up the slices'
// sums, in a fixed order, into those of the first.
template <class Sum>
__device__ __forceinline__ void add_slices(Sum* sums, int lanes) {
  __syncthreads();
  for (int half = (int)blockDim.x / 2; half >= lanes; half /= 2) {
    if ((int)threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
}

// The sum of term(i) for i = first, first + step, ... before end. U terms are loaded at a time, the last few as well: what
// a loop that is only unrolled leaves over, it would wait for one by one.
template <int U, class Int, class Term>
__device__ __forceinline__ auto sum_strided(std::type_identity_t<Int> first, Int end, std::type_identity_t<Int> step,
                                            const Term& term) {
  decltype(term(first)) total{};
  for (; first < end; first += U * step) {
    decltype(total) terms[U] = {};
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (first + u * step < end) terms[u] = term(first + u * step);
#pragma unroll
    for (int u = 0; u < U; ++u) total += terms[u];
  }
  return total;
}

constexpr int kMostSumThreads = 1024;

// out: sums of partials [parts, values] over parts; values [rows, columns] are written transposed if `transpose`.
static __global__ void __launch_bounds__(kMostSumThreads)
    sum_parts_kernel(const float* __restrict__ partials, int64_t parts, int64_t rows, int64_t columns, int lanes,
                     bool transpose, float* __restrict__ out) {
  EFFNET_FAST_SHARED(shared);
  const int lane = threadIdx.x % lanes, slice = threadIdx.x / lanes, slices = blockDim.x / lanes;
  const int64_t value = (int64_t)blockIdx.x * lanes + lane, values = rows * columns;
  float total = 0;
  if (value < values)
    total = sum_strided<8>(slice, parts, slices, [&](int64_t part) { return partials[part * values + value]; });
  shared[threadIdx.x] = total;
  add_slices(shared, lanes);
  if (slice > 0 || value >= values) return;
  out[transpose ? value % columns * rows + value / columns : value] = shared[lane];
}

constexpr int kMomentLanes = 8, kMomentThreads = 512;  // 8 floats: the 32 bytes that memory moves at least

// Of values' distances from one of them.
struct DistanceSums {
  double count, sum, square;

  __device__ __forceinline__ DistanceSums& operator+=(const DistanceSums& other) {
    count += other.count;
    sum += other.sum;
    square += other.square;
    return *this;
  }
};

// mean and m2 [channels] from partials [parts, 4, channels], in double, about the mean of the first part.
static __global__ void __launch_bounds__(kMomentThreads)
    merge_moments_kernel(const float* __restrict__ partials, int64_t parts, int channels, float* __restrict__ mean,
                         float* __restrict__ m2) {
  EFFNET_FAST_SHARED(shared);
  DistanceSums* sums = reinterpret_cast<DistanceSums*>(shared);
  const int lane = threadIdx.x % kMomentLanes, slice = threadIdx.x / kMomentLanes;
  const int c = blockIdx.x * kMomentLanes + lane;
  const int64_t stride = channels;
  DistanceSums total{0, 0, 0};
  double origin = 0;
  if (c < channels && parts > 0) {
    origin = (double)partials[stride + c] + partials[2 * stride + c];
    total = sum_strided<4>(slice, parts, kMomentThreads / kMomentLanes, [&](int64_t part) {
      const float* from = partials + part * 4 * stride + c;
      const double count = from[0], d = (double)from[stride] + from[2 * stride] - origin, moved = count * d;
      return DistanceSums{count, moved, from[3 * stride] + moved * d};
    });
  }
  sums[threadIdx.x] = total;
  add_slices(sums, kMomentLanes);
  if (slice > 0 || c >= channels) return;
  total = sums[lane];
  const double d = total.count > 0 ? total.sum / total.count : 0;
  mean[c] = (float)(origin + d);
  m2[c] = (float)(total.square - total.sum * d);
}

void sum_parts(const float* partials, int64_t parts, int64_t rows, int64_t columns, bool transpose, float* out,
               const Launch& on) {
  // a thread adds up a few parts: 8 of 8, 8 of 64, 33 of 1056
  const int threads = parts <= 64 ? 256 : kMostSumThreads, lanes = parts <= 8 ? threads : 32;
  const int64_t blocks = ceil_div<int64_t>(rows * columns, lanes);
  if (blocks > 0)
    EFFNET_FAST_LAUNCH(sum_parts_kernel, blocks, threads, threads * (int)sizeof(float), on.stream, partials, parts,
                       rows, columns, lanes, transpose, out);
}

void merge_moments(const float* partials, int64_t parts, int channels, float* mean, float* m2, const Launch& on) {
  EFFNET_FAST_LAUNCH(merge_moments_kernel, ceil_div(channels, kMomentLanes), kMomentThreads,
                     kMomentThreads * (int)sizeof(DistanceSums), on.stream, partials, parts, channels, mean, m2);
}

}  // namespace effnet_fast
