// How the passes cut their work into blocks: plain numbers that follow from the shape and the number of
// multiprocessors, for the launchers, the bindings (sizes of partial buffers) and the traffic model.
#pragma once

#include <algorithm>
#include <cstdint>

namespace effnet_fast {

// An activation that lies channels_last (NHWC) in memory.
struct Shape {
  int64_t n;
  int c, h, w;
  constexpr int64_t pixels() const { return (int64_t)h * w; }
  // All images as the rows of one, for sums over all of them. An image's pixels fit an int.
  constexpr Shape as_one_image() const { return {1, c, (int)n, h * w}; }
};

// Where a depthwise convolution reads: output (oh, ow) covers input rows oh * stride - pad_h + [0, kernel).
struct Window {
  int kernel, stride, pad_h, pad_w, out_h, out_w;
};

template <class Int>
constexpr Int ceil_div(Int a, Int b) { return (a + b - 1) / b; }

// Passes that touch each element once. A block takes `lanes` vectors of channels and a chunk of an image's pixels,
// `rows` pixels at a time; a thread stays with its channels, whose operands it keeps in registers.
struct PixelPlan {
  static constexpr int kThreads = 256;
  int vector, lanes, groups, rows, chunks;
  int64_t chunk, blocks;

  PixelPlan(const Shape& s, int vector, int multiprocessors) : vector(vector) {
    const int vectors = s.c / vector;
    groups = ceil_div(vectors, 32);
    lanes = ceil_div(vectors, groups);
    rows = kThreads / lanes;
    // enough blocks for eight on each multiprocessor, but at least eight pixels a thread: each block leaves partial sums
    const int64_t wanted = ceil_div<int64_t>(8 * multiprocessors, std::max<int64_t>(1, s.n * groups));
    chunks = (int)std::max<int64_t>(1, std::min(wanted, s.pixels() / (8 * rows)));
    chunk = std::max<int64_t>(1, ceil_div<int64_t>(s.pixels(), chunks));
    chunks = (int)ceil_div(s.pixels(), chunk);
    blocks = s.n * groups * chunks;
  }
};

constexpr int kGroup = 32;  // channels of a block of the depthwise passes: a warp's threads, 64 bytes or more of a pixel

// Depthwise passes. A block takes a group of channels and marches down the rows of a tile: a strip of `columns` columns
// and a segment of `rows` rows of one image, a few rows at a time. It takes one tile after another and leaves one set of
// partial sums.
struct DepthwisePlan {
  int vector, groups, columns, strips, rows, segments, threads, tiles, parts;

  // columns_per_thread: how many of its columns one thread computes. most_blocks: of that many threads, as many as run
  // at once, since each leaves partial sums and all should end together.
  DepthwisePlan(int64_t n, int c, int vector, int height, int width, int columns_per_thread, int max_threads,
                int resident_threads, int multiprocessors)
      : vector(vector) {
    groups = ceil_div(c, kGroup);
    strips = ceil_div(width, max_threads / kGroup * columns_per_thread);
    columns = ceil_div(ceil_div(width, strips), columns_per_thread) * columns_per_thread;
    strips = ceil_div(width, columns);
    threads = columns / columns_per_thread * kGroup;
    const int64_t blocks = (int64_t)multiprocessors * std::max(1, resident_threads / threads);
    // short segments re-read rows, so only where there are too few tiles to go round
    const int64_t whole = std::max<int64_t>(1, n * strips * groups), wanted = (blocks + whole / 2) / whole;
    segments = (int)std::clamp<int64_t>(wanted, 1, ceil_div(height, 8));
    rows = ceil_div(height, segments);
    segments = ceil_div(height, rows);
    tiles = (int)(n * strips * segments);
    // in as many waves of blocks as end soonest: each takes as long as the most tiles of a part, and one to start and end
    int64_t soonest = INT64_MAX;
    parts = tiles;
    for (int waves = 1; waves <= 4 && tiles > 0; ++waves) {
      const int candidate = (int)std::clamp<int64_t>(waves * blocks / groups, 1, tiles);
      const int64_t end = ceil_div<int64_t>((int64_t)candidate * groups, blocks) * (ceil_div(tiles, candidate) + 1);
      if (end < soonest) {
        soonest = end;
        parts = candidate;
      }
    }
  }

  // Rows that a block takes at a time, of the `margin` more than its tile's that it marches over: few barriers and many
  // loads in flight, within the shared memory that is given.
  int step_rows(int margin, int bytes_per_row, int bytes) const {
    const int most = std::clamp(bytes / bytes_per_row, 1, 4);
    return ceil_div(rows + margin, ceil_div(rows + margin, most));
  }
};

constexpr int kForwardColumns = 2;  // columns of a thread in the forward pass

// Threads of a block at most, and of all blocks on a multiprocessor, as the kernels' registers allow. Several small
// blocks wait less for each other than a large one, but load more columns twice. On an H100, small ones are a tenth to a
// third faster with a stride of 2, and large ones by 2 to 6 % in the 3x3 kernels with a stride of 1. Backward, on an H200,
// two blocks of 12 warps at 3x3 are an eighth to a quarter faster than one of 14, and two of 8 at 5x5 up to a tenth.
constexpr int forward_threads(int kernel, int stride) { return kernel == 3 && stride == 1 ? 448 : 224; }
constexpr int forward_resident(int kernel) { return kernel == 3 ? 896 : 448; }
constexpr int backward_threads(int kernel, int stride) {
  return kernel == 3 && stride == 1 ? 384 : kernel == 7 || stride == 1 ? 256 : 224;
}
constexpr int backward_resident(int kernel, int stride) {
  return kernel == 7 ? 256 : stride == 2 ? 448 : kernel == 5 ? 512 : 768;
}

// Marches over output rows and columns.
inline DepthwisePlan forward_plan(const Shape& s, const Window& w, int vector, int multiprocessors) {
  return {s.n,
          s.c,
          vector,
          w.out_h,
          w.out_w,
          kForwardColumns,
          forward_threads(w.kernel, w.stride),
          forward_resident(w.kernel),
          multiprocessors};
}

// The shared memory of a block of the forward pass: two buffers of activated rows, sets of rows on their way, the input's
// operands.
constexpr int forward_sets(int value_bytes) { return value_bytes == 2 ? 4 : 3; }
struct ForwardShape {
  int width, step, activated, set, operands, bytes;  // input columns; output rows a step; floats, values, floats

  // In 48 KB, so that every GPU gives it without being asked.
  ForwardShape(const DepthwisePlan& plan, int kernel, int stride, int value_bytes) {
    constexpr int kFloat = sizeof(float);
    const int sets = forward_sets(value_bytes);
    width = (plan.columns - 1) * stride + kernel;
    const int row_values = stride * width * kGroup, operand_floats = 2 * kGroup;
    step = plan.step_rows(ceil_div(kernel, stride) - 1, row_values * (2 * kFloat + sets * value_bytes),
                          (48 << 10) - operand_floats * kFloat);
    activated = set = step * row_values;
    operands = 2 * activated + sets * set * value_bytes / kFloat;
    bytes = std::max(operands + operand_floats, 4 * plan.threads) * kFloat;
  }
};

// The backward pass marches over positions: position m covers the input rows (or columns) m * stride - pad + [0, stride).
constexpr int first_position(int pad, int stride) { return pad / stride; }
constexpr int positions(int size, int pad, int stride) { return (size - 1 + pad) / stride - pad / stride + 1; }

inline DepthwisePlan backward_plan(const Shape& s, const Window& w, int vector, int multiprocessors) {
  return {s.n,
          s.c,
          vector,
          positions(s.h, w.pad_h, w.stride),
          positions(s.w, w.pad_w, w.stride),
          1,
          backward_threads(w.kernel, w.stride),
          backward_resident(w.kernel, w.stride),
          multiprocessors};
}

// The shared memory of a block of the backward pass: two buffers of rows of the output's gradient, sets of rows of grad,
// y and x on their way, what a thread keeps of the rows in its window, the operands.
constexpr int kBackwardSets = 3;
constexpr int kept_rows(int kernel, int stride) { return kernel + stride - 1; }  // the window's, in multiples of stride
struct BackwardShape {
  // output columns; rows a step; floats of a buffer; values of the rows of grad or y in a set, and of all of a set;
  // floats before what is kept and before the operands
  int width, step, buffer, grads, set, kept, operands, bytes;

  // In the 99 KB that a block may have on every GPU with asynchronous copies.
  BackwardShape(const DepthwisePlan& plan, int kernel, int stride, int value_bytes) {
    constexpr int kFloat = sizeof(float);
    const int meets = ceil_div(kernel, stride);  // output rows, and columns, that one position meets
    width = plan.columns + meets - 1;
    const int grad_row = width * kGroup, set_row = (2 + stride * stride) * grad_row;
    // seven of the output's gradient, three of the input's norm
    const int kept_floats = 2 * kept_rows(kernel, stride) * stride * plan.threads, operand_floats = 10 * kGroup;
    step = plan.step_rows(meets - 1, 2 * grad_row * kFloat + kBackwardSets * set_row * value_bytes,
                          (96 << 10) - (kept_floats + operand_floats) * kFloat);
    buffer = grads = step * grad_row;
    set = step * set_row;
    kept = 2 * buffer + kBackwardSets * set * value_bytes / kFloat;
    operands = kept + kept_floats;
    bytes = std::max(operands + operand_floats, kernel * plan.threads) * kFloat;
  }
};

}  // namespace effnet_fast
