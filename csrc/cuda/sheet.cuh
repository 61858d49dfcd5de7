// Rows of an activation on their way through a block of the depthwise passes: 32 channels of some columns and rows.
#pragma once

#include "gpu.cuh"
#include "plans.h"

namespace effnet_fast {

// The channels of a block and a thread's place among them.
struct Place {
  int c0, count, lane, column;  // channels c0 + [0, count); thread: channel c0 + lane, `column`-th thread of the row
  int part;
  bool active;

  __device__ Place(const DepthwisePlan& plan, int channels) {
    part = (int)blockIdx.x / plan.groups;
    c0 = (int)blockIdx.x % plan.groups * kGroup;
    count = min(kGroup, channels - c0);
    lane = threadIdx.x % kGroup;
    column = threadIdx.x / kGroup;
    active = lane < count;
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

// How the threads of a block share the pixels of a sheet of `width` columns: a thread takes V channels of every
// so-many-th pixel. Neither the pixel's row nor its column takes a division.
template <int V>
struct Sharing {
  static constexpr int kVectors = kGroup / V;
  int width, channel, first, row, column, row_step, column_step;

  __device__ explicit Sharing(int width) : width(width) {
    const int pixels = blockDim.x / kVectors;
    channel = threadIdx.x % kVectors * V;
    first = threadIdx.x / kVectors;
    row = first / width;
    column = first % width;
    row_step = pixels / width;
    column_step = pixels % width;
  }
  // f(pixel, its row, its column) for this thread's pixels of a sheet of so many rows.
  template <class F>
  __device__ __forceinline__ void each(int rows, const F& f) const {
    int r = row, c = column;
    for (int pixel = first; r < rows; pixel += blockDim.x / kVectors) {
      f(pixel, r, c);
      r += row_step;
      c += column_step;
      if (c >= width) {
        c -= width;
        ++r;
      }
    }
  }
};

// Where a sheet lies in an image, [height][width][channels] from the block's first channel on.
template <class T>
struct Origin {
  const T* image;
  int row, column, height, width, channels;

  __device__ __forceinline__ bool inside(int r, int c) const {
    return (unsigned)(row + r) < (unsigned)height && (unsigned)(column + c) < (unsigned)width;
  }
  __device__ __forceinline__ const T* at(int r, int c) const {
    return image + ((row + r) * width + column + c) * channels;
  }
};

// Channels of a pixel of fp32 in shared memory lie so that neither threads that store four of them nor threads that
// load one meet in a bank: pixels in odd columns have their fours swapped in pairs.
__device__ __forceinline__ int swapped(int channel, int column) { return channel ^ ((column & 1) << 2); }

}  // namespace effnet_fast
