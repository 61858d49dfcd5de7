// Depthwise convolution, backward: one sweep gives the input's gradient, the weight's gradient and the sums of the
// input's BatchNorm. A block marches down the rows of the output's gradient, a few at a time: rows of (grad, y) and of x
// are copied to shared memory well ahead, 16 bytes a thread, and the output's gradient is formed from the former two. A
// thread holds one channel of one position: `stride` input columns. It slides a window of K input rows down, with what
// each row has gathered so far and its activated value, and meets each gradient of the output twice while it is in a
// register: for the input's gradient, and for the weight's.
#pragma once

#include "operands.h"
#include "sheet.cuh"

namespace effnet_fast {

// weight_partials [parts, K * K, C], sum_partials [parts, 2, C] (sums of g and g * hat; zeros without a norm).
// norm: of the BatchNorm + SiLU between the input and the convolution, or nulls.
// The windows and both sets of weights take 24 registers at 3x3 and 60 at 5x5, where more than 16 warps on a
// multiprocessor would only spill.
template <class T, int K, int S, int V>
__global__ void __launch_bounds__(backward_threads(K, S), backward_resident(K, S) / backward_threads(K, S))
    depthwise_backward_kernel(const T* __restrict__ grad, const T* __restrict__ y, const T* __restrict__ x,
                              const float* __restrict__ weight, OutputGrad op, Normalization norm, T* __restrict__ dx,
                              float* __restrict__ weight_partials, float* __restrict__ sum_partials, Shape s, Window win,
                              DepthwisePlan plan, BackwardShape shape) {
  constexpr int kColumns = ceil_div(K, S);  // output columns, and rows, that one position meets
  constexpr int kKept = kept_rows(K, S), kSets = kBackwardSets;
  EFFNET_FAST_SHARED(shared);
  const Place place(plan, s.c);
  const int c = place.c0 + place.lane;
  T* sets = reinterpret_cast<T*>(shared + 2 * shape.buffer);
  float* kept = shared + shape.kept + 2 * threadIdx.x;  // [slot][column][thread]: SiLU's slope, and x - mean
  float* operands = shared + shape.operands;  // [10][channel]
  const auto stage = [&](int which, const float* from, float otherwise = 0) {
    for (int i = threadIdx.x; i < place.count; i += blockDim.x)
      operands[which * kGroup + i] = from ? from[i] : otherwise;
  };
  if (op.scale) {
    stage(0, op.scale + place.c0);
    stage(1, op.shift + place.c0);
    stage(2, op.mean + place.c0);
    stage(3, op.a + place.c0);
    stage(4, op.b + place.c0);
  }
  if (norm.scale) {
    stage(7, norm.scale + place.c0);
    stage(8, norm.shift + place.c0);
    stage(9, norm.mean + place.c0);
  }
  const float* in_norm = operands + 7 * kGroup + place.lane;
  float w[K * K] = {}, dw[K * K] = {}, sum = 0, product = 0;
  if (place.active)
#pragma unroll
    for (int i = 0; i < K * K; ++i) w[i] = weight[(int64_t)c * K * K + i];
  const Sharing<V> sharing(shape.width);
  const int first_row = first_position(win.pad_h, S), row_end = first_row + positions(s.h, win.pad_h, S);

  const int tile_end = Tile::first_of(place.part + 1, plan);
  for (int t = Tile::first_of(place.part, plan); t < tile_end; ++t) {
    Tile tile(t, plan, row_end - first_row);
    tile.row += first_row;
    tile.row_end += first_row;
    tile.column += first_position(win.pad_w, S);
    const int64_t of_image = (int64_t)tile.image * s.c + place.c0;
    stage(5, op.gate ? op.gate + of_image : nullptr, 1);
    stage(6, op.pooled_grad ? op.pooled_grad + of_image : nullptr);

    // Positions [first, tile.row_end), the rows of the output's gradient that the tile meets. With position m, rows
    // m * S - pad + K - S + [0, S) enter the window and m * S - pad + [0, S) leave it.
    const int first = tile.row - (kColumns - 1), steps = ceil_div(tile.row_end - first, shape.step);
    const int64_t output_image = (int64_t)tile.image * win.out_h * win.out_w * s.c + place.c0;
    Origin<T> of_grad{grad + output_image, 0, tile.column - (kColumns - 1), win.out_h, win.out_w, s.c};
    const T* image = x + tile.image * s.pixels() * s.c + place.c0;
    const auto copy = [&](int step) {
      if (step < steps) {
        T* set = sets + step % kSets * shape.set;
        of_grad.row = first + step * shape.step;
        sharing.each(shape.step, [&](int pixel, int r, int column) {
          const bool inside = of_grad.inside(r, column) && sharing.channel < place.count;
          const int at = pixel * kGroup + sharing.channel;
          const int64_t offset = inside ? of_grad.at(r, column) - grad + sharing.channel : 0;
          copy_packet<T, V>(set + at, grad + offset, inside);
          if (op.scale) copy_packet<T, V>(set + shape.grads + at, y + offset, inside);
        });
        // Row after row of the input's even columns, then its odd ones, so that a row has no more than one of grad.
        sharing.each(shape.step * S * S, [&](int pixel, int r, int column) {
          const int row = (first + step * shape.step) * S - win.pad_h + K - S + r / S;
          const int input_column = (tile.column + column) * S - win.pad_w + r % S;
          const bool inside = column < plan.columns && (unsigned)row < (unsigned)s.h &&
                              (unsigned)input_column < (unsigned)s.w && sharing.channel < place.count;
          const int64_t offset = inside ? (row * s.w + input_column) * s.c + sharing.channel : 0;
          copy_packet<T, V>(set + 2 * shape.grads + pixel * kGroup + sharing.channel, image + offset, inside);
        });
      }
      close_copies();
    };
    // The output's gradient, from this thread's own copies of grad and y.
    const auto form = [&](int step, float* buffer) {
      const T *grads = sets + step % kSets * shape.set, *ys = grads + shape.grads;
      of_grad.row = first + step * shape.step;
      sharing.each(shape.step, [&](int pixel, int r, int column) {
        constexpr int U = V == 1 || sizeof(T) == 4 ? 1 : 2;  // channels at a time, for few registers
        const bool formed = op.scale && of_grad.inside(r, column) && sharing.channel < place.count;
#pragma unroll
        for (int channel = sharing.channel, k0 = 0; k0 < V; k0 += U, channel += U) {
          float dy[U];
          Packet<T, U>::load(grads + pixel * kGroup + channel).unpack(dy);
          if (formed) {
            const float* mine = operands + channel;
            float value[U], scale[U], other[U], slope[U];
            Packet<T, U>::load(ys + pixel * kGroup + channel).unpack(value);
            load_shared(mine, scale);
            load_shared(mine + kGroup, other);
#pragma unroll
            for (int k = 0; k < U; ++k) {
              const float u = value[k] * scale[k] + other[k], sig = sigmoid_of<T>(u);
              slope[k] = silu_slope(sig, u * sig) * scale[k];
            }
            load_shared(mine + 5 * kGroup, scale);  // the gate
            load_shared(mine + 6 * kGroup, other);  // pooled_grad
#pragma unroll
            for (int k = 0; k < U; ++k) dy[k] = (dy[k] * scale[k] + other[k]) * slope[k];
            load_shared(mine + 2 * kGroup, scale);  // the mean
            load_shared(mine + 4 * kGroup, other);  // b
            load_shared(mine + 3 * kGroup, slope);  // a
#pragma unroll
            for (int k = 0; k < U; ++k) dy[k] += (value[k] - scale[k]) * other[k] + slope[k];
          }
          store_shared(buffer + pixel * kGroup + swapped(channel, column), dy);
        }
      });
    };
    __syncthreads();  // and the last tile's rows are read
#pragma unroll
    for (int step = 0; step < kSets - 1; ++step) copy(step);

    // The thread's input columns, and the rows that are the tile's: the window's first row is `row` rows beyond those.
    const int column = (tile.column + place.column) * S - win.pad_w, owned = max(tile.row * S - win.pad_h, 0);
    const unsigned owned_rows = min(s.h, tile.row_end * S - win.pad_h) - owned;
    bool mine[S];
#pragma unroll
    for (int p = 0; p < S; ++p) mine[p] = place.active && column + p >= 0 && column + p < s.w;
    const auto keep = [&](int of_slot, int p) {
      return kept + ((of_slot < kKept ? of_slot : of_slot - kKept) * S + p) * 2 * blockDim.x;
    };
    float acc[K][S] = {}, activated[K][S] = {};
    int row = first * S - win.pad_h - owned, slot = 0;  // slot: where the rows that enter are kept
    T* to = dx + (tile.image * s.pixels() + (int64_t)(owned + row) * s.w + column) * s.c + c;
    for (int step = 0; step < steps; ++step) {
      float* buffer = shared + (step & 1) * shape.buffer;
      wait_for_copies<kSets - 2>();
      form(step, buffer);
      __syncthreads();
      copy(step + kSets - 1);  // over what was read before that barrier
      // where this thread's channel lies in the columns from its last on down, of every second one
      const float* from[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = place.column + kColumns - 1 - i;
        from[i] = buffer + column * kGroup + swapped(place.lane, column);
      }
      const T* entering = sets + step % kSets * shape.set + 2 * shape.grads + place.column * kGroup + place.lane;
      const int position_end = min(shape.step, tile.row_end - first - step * shape.step);
      for (int r = 0; r < position_end; ++r) {
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
            const int enters = kh + S - K;
            float entered[1];
            Packet<T, 1>::load(entering + (enters * S + p) * shape.width * kGroup).unpack(entered);
            if (norm.scale) {
              const float u = entered[0] * in_norm[0] + in_norm[kGroup], sig = sigmoid_of<T>(u), z = u * sig;
              store_shared(keep(slot + enters, p), {silu_slope(sig, z), entered[0] - in_norm[2 * kGroup]});
              entered[0] = z;
            }
            activated[kh][p] = mine[p] && (unsigned)(row + kh) < owned_rows ? entered[0] : 0.f;
          }
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const float dy = from[i % 2][-(i / 2) * 2 * kGroup];
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
        for (int leaves = 0; leaves < S; ++leaves)  // these rows have met all that they meet
#pragma unroll
          for (int p = 0; p < S; ++p) {
            if (!mine[p] || (unsigned)(row + leaves) >= owned_rows) continue;
            float slope_and_centered[2] = {1, 0};
            if (norm.scale) load_shared(keep(slot + 2 * S - 1 + leaves, p), slope_and_centered);
            const Packet<T, 1> stored = Packet<T, 1>::pack({acc[leaves][p] * slope_and_centered[0]});
            stored.store(to + (leaves * s.w + p) * s.c);
            float rounded[1];
            stored.unpack(rounded);
            sum += rounded[0];
            product += rounded[0] * slope_and_centered[1];
          }
        slot = slot + S < kKept ? slot + S : 0;
        row += S;
        to += S * s.w * s.c;
        from[0] += shape.width * kGroup;
        from[1] += shape.width * kGroup;
        entering += S * S * shape.width * kGroup;
      }
    }
  }

  // Totals of the block's positions, one kernel row after another, then the two sums.
  const auto total = [&](float* out, int values) {  // shared: [values][position][channel]
    __syncthreads();
    for (int k = threadIdx.x; k < values * place.count; k += blockDim.x) {
      const int i = k / place.count, lane = k % place.count;
      float total = 0;
      for (int position = 0; position < plan.columns; ++position)
        total += shared[(i * plan.columns + position) * kGroup + lane];
      out[(int64_t)i * s.c + place.c0 + lane] = total;
    }
    __syncthreads();
  };
  const auto leave = [&](int i, float value) { shared[i * blockDim.x + threadIdx.x] = value; };
  __syncthreads();
#pragma unroll
  for (int kh = 0; kh < K; ++kh) {
#pragma unroll
    for (int kw = 0; kw < K; ++kw) leave(kw, dw[kh * K + kw]);
    total(weight_partials + ((int64_t)place.part * K + kh) * K * s.c, K);
  }
  leave(0, norm.scale ? sum : 0.f);
  leave(1, norm.scale && place.active ? product * norm.rstd[c] : 0.f);
  total(sum_partials + (int64_t)place.part * 2 * s.c, 2);
}

}  // namespace effnet_fast
