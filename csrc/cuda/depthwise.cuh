// Depthwise convolution, forward. A block marches down the rows of a tile, a few at a time. Rows are copied to shared
// memory well ahead, 16 bytes a thread, then activated into fp32 and convolved: a thread holds one channel of two
// columns, its weights in registers, and a window of output rows that are not complete yet, which slides down.
#pragma once

#include "operands.h"
#include "sheet.cuh"

namespace effnet_fast {

// Stores y and keeps its statistics; partials [parts, 4, C] as those of channel_stats.
template <class T>
struct StatisticsSink {
  T* out;
  float* partials;

  struct Sums {
    ShiftedSums sums;
    int count;
  };
  __device__ __forceinline__ Sums begin(int) const { return {{}, 0}; }
  // The first `columns` of a row's values, `stride` apart.
  template <int Q>
  __device__ __forceinline__ void take(Sums& sums, T* to, int stride, const float (&values)[Q], int columns) const {
    if (sums.count == 0) sums.sums.first = values[0];
    sums.count += columns;
#pragma unroll
    for (int q = 0; q < Q; ++q)
      if (q < columns) {
        Packet<T, 1>::pack({values[q]}).store(to + q * stride);
        sums.sums.add(values[q], false);
      }
  }
  // `shared`: four floats a thread, [4][column thread][channel].
  __device__ __forceinline__ void finish(const Sums& sums, float* shared, const Place& place, const DepthwisePlan&,
                                         int64_t, int channels) const {
    const int plane = blockDim.x;
    const Moments mine = sums.sums.moments(sums.count);
    shared[threadIdx.x] = mine.count;
    shared[plane + threadIdx.x] = sums.sums.first;
    shared[2 * plane + threadIdx.x] = mine.mean;
    shared[3 * plane + threadIdx.x] = mine.m2;
    __syncthreads();
    if (place.column > 0 || !place.active) return;
    const float *firsts = shared + plane, *means = firsts + plane, *m2s = means + plane, first = firsts[place.lane];
    Moments total{0, 0, 0};
    for (int i = place.lane; i < plane; i += kGroup)
      total.merge({shared[i], firsts[i] - first + means[i], m2s[i]});
    float* out = partials + (int64_t)place.part * 4 * channels + place.c0 + place.lane;
    out[0] = total.count;
    out[channels] = first;
    out[2 * (int64_t)channels] = total.mean;
    out[3 * (int64_t)channels] = total.m2;
  }
};

// Stores SiLU(y * scale + shift) and sums it; partials [tiles of an image, N, C]. For blocks of one tile.
template <class T>
struct AffineSink {
  T* out;
  const float *scale, *shift;
  float* partials;

  struct Sums {
    float scale, shift, sum;
  };
  __device__ __forceinline__ Sums begin(int c) const { return {scale[c], shift[c], 0}; }
  template <int Q>
  __device__ __forceinline__ void take(Sums& sums, T* to, int stride, const float (&values)[Q], int columns) const {
#pragma unroll
    for (int q = 0; q < Q; ++q)
      if (q < columns) {
        const float u = values[q] * sums.scale + sums.shift, activated = u * sigmoid_of<T>(u);
        Packet<T, 1>::pack({activated}).store(to + q * stride);
        sums.sum += activated;
      }
  }
  __device__ __forceinline__ void finish(const Sums& sums, float* shared, const Place& place, const DepthwisePlan& plan,
                                         int64_t images, int channels) const {
    shared[threadIdx.x] = sums.sum;
    __syncthreads();
    if (place.column > 0 || !place.active) return;
    float total = 0;
    for (int i = place.lane; i < (int)blockDim.x; i += kGroup) total += shared[i];
    const int per_image = plan.strips * plan.segments, tile = place.part;
    partials[(tile % per_image * images + tile / per_image) * channels + place.c0 + place.lane] = total;
  }
};

// 3x3: two blocks of 14 warps, 44 % of the warps that fit; 5x5 and 7x7 are bound by arithmetic, and keep 25 and 49
// weights in registers instead.
template <class T, int K, int S, int V, class Sink>
__global__ void __launch_bounds__(forward_threads(K, S), forward_resident(K) / forward_threads(K, S))
    depthwise_kernel(const T* __restrict__ x, const float* __restrict__ weight, InputAffine input, Sink sink, Shape s,
                     Window win, DepthwisePlan plan, ForwardShape shape) {
  constexpr int kQ = kForwardColumns, kColumns = (kQ - 1) * S + K, kSets = forward_sets(sizeof(T));
  constexpr int kRows = ceil_div(K, S);  // output rows that an input row belongs to
  EFFNET_FAST_SHARED(shared);
  const Place place(plan, s.c);
  T* sets = reinterpret_cast<T*>(shared + 2 * shape.activated);
  float *scale = shared + shape.operands, *shift = scale + kGroup;
  if (input.scale)
    for (int i = threadIdx.x; i < place.count; i += blockDim.x) {
      scale[i] = input.scale[place.c0 + i];
      shift[i] = input.shift[place.c0 + i];
    }
  float w[K * K] = {};
  typename Sink::Sums sums{};
  if (place.active) {
#pragma unroll
    for (int i = 0; i < K * K; ++i) w[i] = weight[(int64_t)(place.c0 + place.lane) * K * K + i];
    sums = sink.begin(place.c0 + place.lane);
  }
  const Sharing<V> sharing(shape.width);

  const int tile_end = Tile::first_of(place.part + 1, plan);
  for (int t = Tile::first_of(place.part, plan); t < tile_end; ++t) {
    const Tile tile(t, plan, win.out_h);
    const int rows = tile.row_end - tile.row + kRows - 1, steps = ceil_div(rows, shape.step);
    Origin<T> origin{x + tile.image * s.pixels() * s.c + place.c0, 0, tile.column * S - win.pad_w, s.h, s.w, s.c};
    const auto copy = [&](int step) {
      if (step < steps) {
        origin.row = (tile.row + step * shape.step) * S - win.pad_h;
        T* set = sets + step % kSets * shape.set + sharing.channel;
        sharing.each(shape.step * S, [&](int pixel, int r, int c) {
          const bool inside = origin.inside(r, c) && sharing.channel < place.count;
          copy_packet<T, V>(set + pixel * kGroup, inside ? origin.at(r, c) + sharing.channel : x, inside);
        });
      }
      close_copies();
    };
    const auto activate = [&](int step, float* buffer) {
      const T* set = sets + step % kSets * shape.set;
      origin.row = (tile.row + step * shape.step) * S - win.pad_h;
      sharing.each(shape.step * S, [&](int pixel, int r, int c) {
        constexpr int U = V == 1 ? 1 : 4;  // channels at a time, for few registers
        const bool active = input.scale && origin.inside(r, c) && sharing.channel < place.count;
#pragma unroll
        for (int channel = sharing.channel, k0 = 0; k0 < V; k0 += U, channel += U) {
          float values[U];
          Packet<T, U>::load(set + pixel * kGroup + channel).unpack(values);
          if (active) {
            float sc[U], sh[U];
            load_shared(scale + channel, sc);
            load_shared(shift + channel, sh);
#pragma unroll
            for (int k = 0; k < U; ++k) {
              const float u = values[k] * sc[k] + sh[k];
              values[k] = u * sigmoid_of<T>(u);
            }
          }
          store_shared(buffer + pixel * kGroup + swapped(channel, c), values);
        }
      });
    };
    __syncthreads();  // the last tile's rows are read, or the operands are there
#pragma unroll
    for (int step = 0; step < kSets - 1; ++step) copy(step);

    float acc[kRows][kQ] = {};  // output rows from `row` on
    int row = tile.row - (kRows - 1);
    const int column = tile.column + place.column * kQ, columns = place.active ? min(kQ, win.out_w - column) : 0;
    T* to = sink.out + (((int64_t)tile.image * win.out_h + row) * win.out_w + column) * s.c + place.c0 + place.lane;
    for (int step = 0; step < steps; ++step) {
      float* buffer = shared + (step & 1) * shape.activated;
      copy(step + kSets - 1);
      wait_for_copies<kSets - 1>();
      activate(step, buffer);
      __syncthreads();
      const float* from = buffer + place.column * kQ * S * kGroup;
      for (int r = 0; r < shape.step && row < tile.row_end; ++r, ++row, to += win.out_w * s.c) {
#pragma unroll
        for (int p = 0; p < S; ++p, from += shape.width * kGroup)
#pragma unroll
          for (int i = 0; i < kColumns; ++i) {
            const float value = from[i * kGroup + swapped(place.lane, i)];
#pragma unroll
            for (int q = 0; q < kQ; ++q) {
              const int kw = i - q * S;
              if (kw < 0 || kw >= K) continue;
#pragma unroll
              for (int j = 0; j < kRows; ++j) {
                const int kh = S * (kRows - 1 - j) + p;
                if (kh >= K) continue;
                // the first product of a row also slides the window
                const float before = p == 0 && kw == 0 ? (j + 1 < kRows ? acc[j + 1][q] : 0.f) : acc[j][q];
                acc[j][q] = before + w[kh * K + kw] * value;
              }
            }
          }
        if (row >= tile.row && columns > 0) sink.take(sums, to, s.c, acc[0], columns);
      }
    }
  }
  __syncthreads();
  sink.finish(sums, shared, place, plan, s.n, s.c);
}

}  // namespace effnet_fast
