// Depthwise convolution, backward: one sweep gives the input's gradient, the weight's gradient and the sums of the
// input's BatchNorm. A block marches down the rows of the output's gradient, which are formed on load from (grad, y),
// 16 bytes a thread, and shared. A thread holds one channel of one position: `stride` input columns. It slides a window
// of K input rows down, with what each row has gathered so far and its activated value, and meets each gradient of the
// output twice while it is in a register: for the input's gradient, and for the weight's.
#pragma once

#include "depthwise.cuh"

namespace effnet_fast {

template <int K, int S>
struct BackwardShape {
  static constexpr int kColumns = (K + S - 1) / S;  // output columns, and rows, that one position meets
  static constexpr int width(int columns) { return columns + kColumns - 1; }
  static constexpr int kOperands = 7;  // of OutputGrad
  // Two buffers of a row, or the partial weight gradients of one kernel row; then the operands.
  static int operands_at(const DepthwisePlan& plan) {
    return std::max(2 * width(plan.columns), K * plan.columns) * plan.channels;
  }
  static int shared_floats(const DepthwisePlan& plan) { return operands_at(plan) + kOperands * plan.channels; }
};

// weight_partials [parts, K * K, C], sum_partials [parts, 2, C] (sums of g and g * hat; zeros without a norm).
// norm: of the BatchNorm + SiLU between the input and the convolution, or nulls.
// The windows and both sets of weights take 24 registers at 3x3 and 60 at 5x5, where 50 products for 8 bytes make
// arithmetic the bound: more than one block of 14 warps, each with its next row in flight, would only spill.
template <class T, int K, int S, int V>
__global__ void __launch_bounds__(backward_threads(K, S), 1)
    depthwise_backward_kernel(const T* __restrict__ grad, const T* __restrict__ y, const T* __restrict__ x,
                              const float* __restrict__ weight, OutputGrad op, Normalization norm, T* __restrict__ dx,
                              float* __restrict__ weight_partials, float* __restrict__ sum_partials, Shape s, Window win,
                              DepthwisePlan plan, int operands_at) {
  using Backward = BackwardShape<K, S>;
  constexpr int kColumns = Backward::kColumns;
  EFFNET_FAST_SHARED(shared);
  const int width = Backward::width(plan.columns);
  const Place place(plan, s.c, plan.columns);
  const int c = place.c0 + place.lane;
  float* operands = shared + operands_at;  // [7][channel]
  const auto stage = [&](int which, const float* from, float otherwise = 0) {
    for (int i = threadIdx.x; i < place.count; i += blockDim.x)
      operands[which * plan.channels + i] = from ? from[i] : otherwise;
  };
  if (op.scale) {
    stage(0, op.scale + place.c0);
    stage(1, op.shift + place.c0);
    stage(2, op.mean + place.c0);
    stage(3, op.a + place.c0);
    stage(4, op.b + place.c0);
  }
  float w[K * K] = {}, dw[K * K] = {}, in_scale = 0, in_shift = 0, in_mean = 0, sum = 0, product = 0;
  if (place.active) {
#pragma unroll
    for (int i = 0; i < K * K; ++i) w[i] = weight[(int64_t)c * K * K + i];
    if (norm.scale) {
      in_scale = norm.scale[c];
      in_shift = norm.shift[c];
      in_mean = norm.mean[c];
    }
  }
  const int vectors = plan.channels / V, row_vectors = width * vectors;
  const int row_end = first_position(win.pad_h, S) + positions(s.h, win.pad_h, S);

  const int tile_end = Tile::first_of(place.part + 1, plan);
  for (int t = Tile::first_of(place.part, plan); t < tile_end; ++t) {
    Tile tile(t, plan, row_end - first_position(win.pad_h, S));
    tile.row += first_position(win.pad_h, S);
    tile.row_end += first_position(win.pad_h, S);
    tile.column += first_position(win.pad_w, S);
    const int64_t of_image = (int64_t)tile.image * s.c + place.c0;
    stage(5, op.gate ? op.gate + of_image : nullptr, 1);
    stage(6, op.pooled_grad ? op.pooled_grad + of_image : nullptr);
    __syncthreads();

    // A row of the output's gradient: columns from tile.column - (kColumns - 1) on.
    const int first_column = tile.column - (kColumns - 1);
    const int64_t output_image = (int64_t)tile.image * win.out_h * win.out_w * s.c + place.c0;
    const auto offset_of = [&](int i, int row) {
      const int column = first_column + i / vectors, vector = i % vectors;
      const bool inside = i < row_vectors && row >= 0 && row < win.out_h && column >= 0 && column < win.out_w &&
                          vector * V < place.count;
      return inside ? (row * win.out_w + column) * s.c + vector * V : -1;
    };
    const auto put = [&](int i, int offset, const Packet<T, V>& grads, const Packet<T, V>& ys, float* buffer) {
      if (i >= row_vectors) return;
      constexpr int U = V == 1 ? 1 : 2;  // channels at a time: few, for few registers
      float dy[V] = {}, value[V] = {};
      if (offset >= 0) {
        grads.unpack(dy);
        ys.unpack(value);
      }
      const int channel = i % vectors * V;
#pragma unroll
      for (int k0 = 0; k0 < V; k0 += U) {
        if (op.scale && offset >= 0) {
          const float* mine = operands + channel + k0;
          float scale[U], other[U], slope[U];
          load_shared(mine, scale);
          load_shared(mine + plan.channels, other);
#pragma unroll
          for (int k = 0; k < U; ++k) {
            const float u = value[k0 + k] * scale[k] + other[k], sig = sigmoid(u);
            slope[k] = silu_slope(sig, u * sig) * scale[k];
          }
          float gate[U], pooled[U], mean[U], a[U], b[U];
          load_shared(mine + 2 * plan.channels, mean);
          load_shared(mine + 3 * plan.channels, a);
          load_shared(mine + 4 * plan.channels, b);
          load_shared(mine + 5 * plan.channels, gate);
          load_shared(mine + 6 * plan.channels, pooled);
#pragma unroll
          for (int k = 0; k < U; ++k)
            dy[k0 + k] = (dy[k0 + k] * gate[k] + pooled[k]) * slope[k] + ((value[k0 + k] - mean[k]) * b[k] + a[k]);
        }
        const float(&stored)[U] = reinterpret_cast<const float(&)[U]>(dy[k0]);
        store_shared(buffer + i * V + k0, stored);
      }
    };
    const auto load = [&](const T* from, int offset) {
      Packet<T, V> packet{};
      if (from && offset >= 0) packet = Packet<T, V>::load(from + (output_image + offset));
      return packet;
    };
    const auto put_rest = [&](int row, float* buffer) {  // of tiles so narrow that a thread has more than one vector
      for (int i = threadIdx.x + blockDim.x; i < row_vectors; i += blockDim.x) {
        const int offset = offset_of(i, row);
        put(i, offset, load(grad, offset), load(y, offset), buffer);
      }
    };

    // The thread's input columns, and where they lie; rows enter the window S at a time.
    const int column = (tile.column + place.column) * S - win.pad_w;
    const int owned = tile.row * S - win.pad_h, owned_end = min(s.h, tile.row_end * S - win.pad_h);
    const int64_t input_image = tile.image * s.pixels() * s.c + c;
    const auto inside = [&](int row, int p) {
      return place.active && row >= max(owned, 0) && row < owned_end && column + p >= 0 && column + p < s.w;
    };
    const auto load_x = [&](int step, Packet<T, 1> (&entering)[S][S]) {
#pragma unroll
      for (int r = 0; r < S; ++r)
#pragma unroll
        for (int p = 0; p < S; ++p) {
          const int row = step * S - win.pad_h + K - S + r;
          entering[r][p] = {};
          if (inside(row, p)) entering[r][p] = Packet<T, 1>::load(x + (input_image + (row * s.w + column + p) * s.c));
        }
    };

    const int first = tile.row - (kColumns - 1);
    Packet<T, 1> entering[S][S];
    load_x(first, entering);
    {
      const int offset = offset_of(threadIdx.x, first);
      put(threadIdx.x, offset, load(grad, offset), load(y, offset), shared);
      put_rest(first, shared);
    }
    __syncthreads();

    float acc[K][S] = {}, activated[K][S] = {};
    for (int step = first; step < tile.row_end; ++step) {
      const bool more = step + 1 < tile.row_end;
      float* buffer = shared + ((step - first) & 1) * width * plan.channels;
      float* other = shared + ((step - first + 1) & 1) * width * plan.channels;
      // the window slides by S rows
#pragma unroll
      for (int kh = 0; kh < K; ++kh)
#pragma unroll
        for (int p = 0; p < S; ++p) {
          acc[kh][p] = kh + S < K ? acc[kh + S][p] : 0.f;
          if (kh + S < K) {
            activated[kh][p] = activated[kh + S][p];
            continue;
          }
          const int r = kh + S - K;
          float entered[1];
          entering[r][p].unpack(entered);
          if (norm.scale) {
            const float u = entered[0] * in_scale + in_shift;
            entered[0] = u * sigmoid(u);
          }
          activated[kh][p] = inside(step * S - win.pad_h + kh, p) ? entered[0] : 0.f;
        }
      int offset = -1;
      Packet<T, V> grads{}, ys{};
      if (more) {
        load_x(step + 1, entering);
        offset = offset_of(threadIdx.x, step + 1);
        grads = load(grad, offset);
        ys = load(y, offset);
      }
      if (place.active) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const float dy = buffer[(place.column + kColumns - 1 - i) * plan.channels + place.lane];
#pragma unroll
          for (int p = 0; p < S; ++p) {
            const int kw = S * i + p;
            if (kw >= K) continue;
#pragma unroll
            for (int kh = 0; kh < K; ++kh) {
              acc[kh][p] += w[kh * K + kw] * dy;
              dw[kh * K + kw] += dy * activated[kh][p];
            }
          }
        }
#pragma unroll
        for (int r = 0; r < S; ++r)  // these rows have met all that they meet
#pragma unroll
          for (int p = 0; p < S; ++p) {
            const int row = step * S - win.pad_h + r;
            if (!inside(row, p)) continue;
            const int64_t at = input_image + (row * s.w + column + p) * s.c;
            if (!norm.scale) {
              Packet<T, 1>::pack({acc[r][p]}).store(dx + at);
              continue;
            }
            float value[1], rounded[1];
            Packet<T, 1>::load(x + at).unpack(value);  // again: cheaper than registers, and still in the nearest cache
            const float u = value[0] * in_scale + in_shift, sig = sigmoid(u);
            const Packet<T, 1> stored = Packet<T, 1>::pack({acc[r][p] * silu_slope(sig, u * sig)});
            stored.store(dx + at);
            stored.unpack(rounded);
            sum += rounded[0];
            product += rounded[0] * (value[0] - in_mean);
          }
      }
      if (more) {
        put(threadIdx.x, offset, grads, ys, other);
        put_rest(step + 1, other);
      }
      __syncthreads();
    }
  }

  // Totals of the block's positions, one kernel row after another, then the two sums.
  const auto total = [&](float* out, int values) {  // shared: [values][position][channel]
    __syncthreads();
    for (int k = threadIdx.x; k < values * place.count; k += blockDim.x) {
      const int i = k / place.count, lane = k % place.count;
      float total = 0;
      for (int position = 0; position < plan.columns; ++position)
        total += shared[(i * plan.columns + position) * plan.channels + lane];
      out[(int64_t)i * s.c + place.c0 + lane] = total;
    }
    __syncthreads();
  };
  const auto leave = [&](int i, float value) {
    if (place.active) shared[(i * plan.columns + place.column) * plan.channels + place.lane] = value;
  };
#pragma unroll
  for (int kh = 0; kh < K; ++kh) {
#pragma unroll
    for (int kw = 0; kw < K; ++kw) leave(kw, dw[kh * K + kw]);
    total(weight_partials + ((int64_t)place.part * K + kh) * K * s.c, K);
  }
  leave(0, sum);
  leave(1, norm.scale && place.active ? product * norm.rstd[c] : 0.f);
  total(sum_partials + (int64_t)place.part * 2 * s.c, 2);
}

}  // namespace effnet_fast
