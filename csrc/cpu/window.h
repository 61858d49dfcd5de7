// Where a convolution reads.
#pragma once

#include "tensors.h"

namespace effnet_fast {

// Output (oh, ow) covers input rows oh * stride - pad_h + [0, kernel), and columns likewise.
struct Window {
  int64_t kernel, stride, pad_h, pad_w, out_h, out_w;
};

inline Window make_window(int64_t h, int64_t w, int64_t k, int64_t stride, bool same) {
  STD_TORCH_CHECK(k == 3 || k == 5 || k == 7, "weight: got a kernel of ", k, ", must be 3, 5 or 7");
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride: got ", stride, ", must be 1 or 2");
  if (!same) return {k, stride, k / 2, k / 2, (h - 1) / stride + 1, (w - 1) / stride + 1};
  const int64_t out_h = (h + stride - 1) / stride, out_w = (w + stride - 1) / stride;
  const int64_t total_h = std::max<int64_t>((out_h - 1) * stride + k - h, 0);
  const int64_t total_w = std::max<int64_t>((out_w - 1) * stride + k - w, 0);
  return {k, stride, total_h / 2, total_w / 2, out_h, out_w};
}

}  // namespace effnet_fast
