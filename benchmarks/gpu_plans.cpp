// The plans of csrc/cuda for the traffic model: the kernels' own arithmetic, without a GPU.
#include <iterator>

#include "../csrc/cuda/plans.h"

using namespace effnet_fast;

extern "C" int pixel_chunks(bool over_all_images, int64_t n, int c, int h, int w, int vector, int multiprocessors) {
  const Shape s{n, c, h, w};
  return PixelPlan(over_all_images ? s.as_one_image() : s, vector, multiprocessors).chunks;
}

// plan: channels, groups, columns, strips, rows, segments, threads, parts
extern "C" void depthwise_plan(bool backward, int64_t n, int c, int h, int w, int kernel, int stride, int pad, int vector,
                               int multiprocessors, int* plan) {
  const Shape s{n, c, h, w};
  const Window win{kernel, stride, pad, pad, ceil_div(h, stride), ceil_div(w, stride)};
  const DepthwisePlan p = backward ? backward_plan(s, win, vector, multiprocessors) : forward_plan(s, win, vector, multiprocessors);
  const int fields[] = {kGroup, p.groups, p.columns, p.strips, p.rows, p.segments, p.threads, p.parts};
  std::copy(std::begin(fields), std::end(fields), plan);
}

// block: threads and bytes of shared memory of a block at its largest, on an image of many columns
extern "C" void depthwise_block(bool backward, int kernel, int stride, int value_bytes, int* block) {
  const Shape s{1, kGroup, 1 << 9, 1 << 9};
  const Window win{kernel, stride, kernel / 2, kernel / 2, s.h / stride, s.w / stride};
  const DepthwisePlan p = backward ? backward_plan(s, win, 1, 1) : forward_plan(s, win, 1, 1);
  block[0] = p.threads;
  block[1] = backward ? BackwardShape(p, kernel, stride, value_bytes).bytes : ForwardShape(p, kernel, stride, value_bytes).bytes;
}
