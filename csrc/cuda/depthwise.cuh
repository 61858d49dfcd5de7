// Depthwise convolution, forward. A block marches down the rows of a tile. Each row is loaded once, 16 bytes a thread,
// activated, and put into shared memory as fp32, while the row before it is convolved: a thread holds one channel of
// two columns, its weights in registers, and a window of output rows that are not complete yet, which slides down.
#pragma once

#include "gpu.cuh"
#include "operands.h"
#include "plans.h"

namespace effnet_fast {

// The channels of a block and a thread's place among them.
struct Place {
  int c0, count, lane, column;  // channels c0 + [0, count); thread: channel c0 + lane, `column`-th thread of the row
  int part;
  bool active;

  __device__ Place(const DepthwisePlan& plan, int channels, int column_threads) {
    part = (int)blockIdx.x / plan.groups;
    c0 = (int)blockIdx.x % plan.groups * plan.channels;
    count = min(plan.channels, channels - c0);
    lane = threadIdx.x % plan.channels;
    column = threadIdx.x / plan.channels;
    active = lane < count && column < column_threads;
  }
};

// A strip of columns and a segment of rows of one image.
struct Tile {
  int image, column, row, row_end;

  // The first tile of a part; its tiles end where the next part's begin.
  __device__ static int first_of(int part, const DepthwisePlan& plan) {
    return (int)((int64_t)plan.tiles * part / plan.parts);
  }
  __device__ Tile(int index, const DepthwisePlan& plan, int height) {
    column = index % plan.strips * plan.columns;
    row = index / plan.strips % plan.segments * plan.rows;
    row_end = min(row + plan.rows, height);
    image = index / plan.strips / plan.segments;
  }
};

// One or two floats of shared memory at once.
__device__ __forceinline__ void store_shared(float* to, const float (&values)[1]) { *to = values[0]; }
__device__ __forceinline__ void store_shared(float* to, const float (&values)[2]) {
  *reinterpret_cast<float2*>(to) = make_float2(values[0], values[1]);
}
__device__ __forceinline__ void load_shared(const float* from, float (&values)[1]) { values[0] = *from; }
__device__ __forceinline__ void load_shared(const float* from, float (&values)[2]) {
  const float2 two = *reinterpret_cast<const float2*>(from);
  values[0] = two.x;
  values[1] = two.y;
}

// Stores y and keeps its statistics; partials [parts, 4, C] as those of channel_stats.
template <class T>
struct StatisticsSink {
  T* y;
  float* partials;

  struct Sums {
    ShiftedSums sums;
    int count;
  };
  __device__ __forceinline__ Sums begin(int) const { return {{}, 0}; }
  __device__ __forceinline__ void take(Sums& sums, int64_t at, float value) const {
    Packet<T, 1>::pack({value}).store(y + at);
    sums.sums.add(value, sums.count == 0);
    ++sums.count;
  }
  // `shared`: four floats a thread, [4][column thread][channel].
  __device__ __forceinline__ void finish(const Sums& sums, float* shared, const Place& place, const DepthwisePlan& plan,
                                         int column_threads, int64_t, int channels) const {
    const int plane = column_threads * plan.channels;
    if (place.active) {
      const Moments<float> mine = sums.sums.moments(sums.count);
      shared[threadIdx.x] = mine.count;
      shared[plane + threadIdx.x] = sums.sums.first;
      shared[2 * plane + threadIdx.x] = mine.mean;
      shared[3 * plane + threadIdx.x] = mine.m2;
    }
    __syncthreads();
    if (place.column > 0 || !place.active) return;
    const float *firsts = shared + plane, *means = firsts + plane, *m2s = means + plane, first = firsts[place.lane];
    Moments<float> total{0, 0, 0};
    for (int i = place.lane; i < plane; i += plan.channels)
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
  T* z;
  const float *scale, *shift;
  float* partials;

  struct Sums {
    float scale, shift, sum;
  };
  __device__ __forceinline__ Sums begin(int c) const { return {scale[c], shift[c], 0}; }
  __device__ __forceinline__ void take(Sums& sums, int64_t at, float value) const {
    const float u = value * sums.scale + sums.shift, activated = u * sigmoid(u);
    Packet<T, 1>::pack({activated}).store(z + at);
    sums.sum += activated;
  }
  __device__ __forceinline__ void finish(const Sums& sums, float* shared, const Place& place, const DepthwisePlan& plan,
                                         int column_threads, int64_t images, int channels) const {
    if (place.active) shared[threadIdx.x] = sums.sum;
    __syncthreads();
    if (place.column > 0 || !place.active) return;
    float total = 0;
    for (int i = place.lane; i < column_threads * plan.channels; i += plan.channels) total += shared[i];
    const int per_image = plan.strips * plan.segments, tile = place.part;
    partials[(tile % per_image * images + tile / per_image) * channels + place.c0 + place.lane] = total;
  }
};

template <int K, int S>
struct ForwardShape {
  static constexpr int kQ = kForwardColumns;
  static constexpr int kRows = (K + S - 1) / S;  // output rows that an input row belongs to
  // Input columns under the windows of `columns` outputs.
  static constexpr int width(int columns) { return (columns - 1) * S + K; }
  // Two buffers of S rows, and the operands of the input; no less than the sinks' four floats a thread.
  static int shared_floats(const DepthwisePlan& plan) {
    return std::max(2 * S * width(plan.columns) * plan.channels, 4 * plan.threads) + 2 * plan.channels;
  }
};

// 3x3: two blocks of 14 warps, 44 % of the warps that fit; 5x5 and 7x7 are bound by arithmetic, and keep 25 and 49
// weights in registers instead.
template <class T, int K, int S, int V, class Sink>
__global__ void __launch_bounds__(forward_threads(K), K == 3 ? 2 : 1)
    depthwise_kernel(const T* __restrict__ x, const float* __restrict__ weight, InputAffine input, Sink sink, Shape s,
                     Window win, DepthwisePlan plan, int operands_at) {
  using Forward = ForwardShape<K, S>;
  constexpr int kQ = Forward::kQ, kRows = Forward::kRows, kColumns = Forward::width(kQ);
  EFFNET_FAST_SHARED(shared);
  const int column_threads = plan.columns / kQ, width = Forward::width(plan.columns);
  const Place place(plan, s.c, column_threads);
  float *scale = shared + operands_at, *shift = scale + plan.channels;
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
  const int vectors = plan.channels / V, step_vectors = S * width * vectors, buffer_floats = S * width * plan.channels;
  __syncthreads();

  const int tile_end = Tile::first_of(place.part + 1, plan);
  for (int t = Tile::first_of(place.part, plan); t < tile_end; ++t) {
    const Tile tile(t, plan, win.out_h);
    const int first_column = tile.column * S - win.pad_w;
    const T* image = x + tile.image * s.pixels() * s.c + place.c0;
    const int64_t output_image = (int64_t)tile.image * win.out_h * win.out_w * s.c + place.c0 + place.lane;
    // Vector i of a step: [row][column][vector] of its S rows. Where it lies in the image, relative to the step's first
    // row, or -1 if the column or channel is outside.
    const auto offset_of = [&](int i) {
      const int vector = i % vectors, column = first_column + i / vectors % width;
      const bool inside = i < step_vectors && column >= 0 && column < s.w && vector * V < place.count;
      return inside ? (i / vectors / width * s.w + column) * s.c + vector * V : -1;
    };
    const auto load = [&](int i, int offset, int step) {
      const int row = step * S - win.pad_h;
      const int my_row = S == 1 || i < step_vectors / S ? row : row + 1;
      Packet<T, V> packet{};
      if (offset >= 0 && my_row >= 0 && my_row < s.h)
        packet = Packet<T, V>::load(image + row * s.w * s.c + offset);
      return packet;
    };
    const auto put = [&](int i, int offset, int step, const Packet<T, V>& packet, float* buffer) {
      if (i >= step_vectors) return;
      const int row = step * S - win.pad_h, my_row = S == 1 || i < step_vectors / S ? row : row + 1;
      constexpr int U = V == 1 ? 1 : 2;  // channels at a time: few, for few registers
      const bool inside = offset >= 0 && my_row >= 0 && my_row < s.h;
      const int channel = i % vectors * V;
      float values[V] = {};
      if (inside) packet.unpack(values);
#pragma unroll
      for (int k0 = 0; k0 < V; k0 += U) {
        float(&few)[U] = reinterpret_cast<float(&)[U]>(values[k0]);
        if (inside && input.scale) {
          float sc[U], sh[U];
          load_shared(scale + channel + k0, sc);
          load_shared(shift + channel + k0, sh);
#pragma unroll
          for (int k = 0; k < U; ++k) {
            const float u = few[k] * sc[k] + sh[k];
            few[k] = u * sigmoid(u);
          }
        }
        store_shared(buffer + i * V + k0, few);
      }
    };
    // A thread loads one vector a step ahead, the rest, of strided or very narrow tiles, as it puts them.
    const int offset = offset_of(threadIdx.x);
    const auto put_rest = [&](int step, float* buffer) {
      for (int i = threadIdx.x + blockDim.x; i < step_vectors; i += blockDim.x) {
        const int offset = offset_of(i);
        put(i, offset, step, load(i, offset, step), buffer);
      }
    };
    put(threadIdx.x, offset, tile.row, load(threadIdx.x, offset, tile.row), shared);
    put_rest(tile.row, shared);
    __syncthreads();

    float acc[kRows][kQ] = {};  // output row step - (kRows - 1) + j
    const int step_end = tile.row_end + kRows - 1;
    for (int step = tile.row; step < step_end; ++step) {
      const bool more = step + 1 < step_end;
      float* buffer = shared + ((step - tile.row) & 1) * buffer_floats;
      float* other = shared + ((step - tile.row + 1) & 1) * buffer_floats;
      Packet<T, V> ahead{};
      if (more) ahead = load(threadIdx.x, offset, step + 1);
      if (place.active) {
#pragma unroll
        for (int p = 0; p < S; ++p)
#pragma unroll
          for (int i = 0; i < kColumns; ++i) {
            const float value = buffer[(p * width + place.column * kQ * S + i) * plan.channels + place.lane];
#pragma unroll
            for (int q = 0; q < kQ; ++q) {
              const int kw = i - q * S;
              if (kw < 0 || kw >= K) continue;
#pragma unroll
              for (int j = 0; j < kRows; ++j) {
                const int kh = S * (kRows - 1 - j) + p;
                if (kh >= K) continue;
                // the first product of a step also slides the window
                const float before = p == 0 && kw == 0 ? (j + 1 < kRows ? acc[j + 1][q] : 0.f) : acc[j][q];
                acc[j][q] = before + w[kh * K + kw] * value;
              }
            }
          }
        const int row = step - (kRows - 1);
        if (row >= tile.row) {
          const int64_t at = output_image + (row * win.out_w + tile.column) * s.c;
#pragma unroll
          for (int q = 0; q < kQ; ++q) {
            const int column = place.column * kQ + q;
            if (tile.column + column < win.out_w) sink.take(sums, at + column * s.c, acc[0][q]);
          }
        }
      }
      if (more) {
        put(threadIdx.x, offset, step + 1, ahead, other);
        put_rest(step + 1, other);
      }
      __syncthreads();
    }
  }
  sink.finish(sums, shared, place, plan, column_threads, s.n, s.c);
}

}  // namespace effnet_fast
