// Inference: the expand product and the depthwise convolution in one sweep over an image's rows. The expanded tensor, six
// times as large as its input, only exists as a ring of rows in the second-level cache. Zen 5, two cores, B0 at 224 px,
// batch 16: 36.5 to 29.5 ms in bf16, 59 to 48 ms in fp32; image by image, but with it stored, 33.2 and 53.5 ms.
#pragma once

#include "depthwise.h"
#include "pointwise.h"

namespace effnet_fast {

// Pixels that are expanded together, at least, where a row has fewer: some tiles of the product.
constexpr int64_t kExpandedTogether = 4 * kVectorRows;

// The depthwise convolution of SiLU(e * scale + shift), e the product of one image x and expand. sink_of(c, lanes, row of the
// output) returns what takes the outputs, as in `depthwise_forward`.
template <class T, int K, int S, class SinkOf>
inline void expand_depthwise_image(const T* x, const Shape& s, const Window& win, const float* expand,
                                   const float* expand_scale, const float* expand_shift, int64_t channels,
                                   const float* weight, const SinkOf& sink_of) {
  using W = Words<T>;
  using P = ProductWords<T>;
  const int64_t words = product_words<P>(s.c), row_words = padded_row(s.c), vectors = (channels + kLanes - 1) / kLanes;
  const int64_t at_once = std::min(s.h, (kExpandedTogether + s.w - 1) / s.w), slots = K - 1 + at_once;
  constexpr int64_t kernel_row = words_of<W>(K) * kLanes;
  const RingRow of_ring(s.w, win);
  const int64_t row_floats = of_ring.floats;
  const int64_t max_rows = (at_once * s.w + P::kRows - 1) / P::kRows * P::kRows;
  float* ring = scratch(vectors * slots * row_floats + max_rows * (row_words + kPanelColumns));
  float* rows = ring + vectors * slots * row_floats;
  float* sums = rows + max_rows * row_words;
  std::memset(ring, 0, vectors * slots * row_floats * sizeof(float));
  end_rows<P>(rows, max_rows, row_words, s.c);
  [[maybe_unused]] const ProductRegisters<P> registers;
  const GatedInput as_it_is(std::nullopt, std::nullopt, std::nullopt, s);

  const auto fill = [&](int64_t begin, int64_t end) {
    const int64_t pixels = (end - begin) * s.w;
    form_rows(x, s, Block{0, begin * s.w, pixels, true, true}, as_it_is, rows, row_words);
    for_each_panel(0, (vectors + kPanelVectors - 1) / kPanelVectors, vectors, [&]<int V>(int64_t panel) {
      multiply_panel<P, V>(pixels, words, rows, row_words, 1, expand + panel * kPanelColumns * words, V * kLanes, sums,
                           V * kLanes, false);
      for (int v = 0; v < V; ++v)
        with_lanes(panel * kPanelVectors + v, channels, [&](auto lanes) {
          const int64_t vector = panel * kPanelVectors + v;
          const Vec scale = load(expand_scale + vector * kLanes, lanes), shift = load(expand_shift + vector * kLanes, lanes);
          const float* from = sums + v * kLanes;
          for (int64_t h = begin; h < end; ++h) {
            float* to = ring + (vector * slots + h % slots) * row_floats + of_ring.left * kLanes;
            write_columns<W>(to, s.w, [&](int64_t i) { return silu<T>(load(from + i * V * kLanes) * scale + shift); });
            from += s.w * V * kLanes;
          }
        });
    });
  };

  int64_t filled = 0;
  for (int64_t oh = 0; oh < win.out_h; ++oh) {
    const int64_t top = oh * S - win.pad_h;
    while (filled < std::min(s.h, top + K)) {
      const int64_t end = std::min(s.h, filled + at_once);
      fill(filled, end);
      filled = end;
    }
    for (int64_t v = 0; v < vectors; ++v)
      with_lanes(v, channels, [&](auto lanes) {
        const float* under[K];
        for (int kh = 0; kh < K; ++kh) {
          const int64_t h = top + kh;
          const float* row = ring + (v * slots + h % slots) * row_floats + of_ring.first_read * kLanes;
          under[kh] = h < 0 || h >= s.h ? nullptr : row;
        }
        auto sink = sink_of(v * kLanes, lanes, oh);
        do
          dw_row<W, K, K, S>(under, weight + v * K * kernel_row, kernel_row, win.out_w, sink);
        while (!sink.finish());
      });
  }
}

// Of one image x: z = SiLU(depthwise convolution of e + depthwise_shift), e = SiLU(product of x and expand + expand_shift),
// and the sums [1, C] of z over its pixels. expand: packed, weight: packed for the window.
inline std::tuple<Tensor, Tensor> expand_depthwise(const Tensor& x, const Tensor& expand, const Tensor& ones,
                                                   const Tensor& expand_shift, const std::vector<float>& weight,
                                                   const Window& win, const Tensor& depthwise_shift) {
  const Shape s = check_nhwc(x, "x");
  const int64_t channels = depthwise_shift.numel(), row = win.out_w * channels;
  const float* before = check_floats(expand_shift, "expand_shift", channels);
  const float* after = check_floats(depthwise_shift, "depthwise_shift", channels);
  Tensor z = empty_nhwc({1, channels, win.out_h, win.out_w}, x.scalar_type()), pooled = empty_floats({1, channels});
  std::memset(floats(pooled), 0, channels * sizeof(float));
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto sink_of = [&](int64_t c, auto lanes, int64_t oh) {
      float* sum = floats(pooled) + c;
      return AffineSink<T, decltype(lanes)>{(T*)z.mutable_data_ptr() + oh * row + c, channels, lanes, sum,
                                            kRowsAhead * row, broadcast(1.f), load(after + c, lanes), load(sum, lanes)};
    };
    dispatch_window(win, [&]<int K, int S>() {
      expand_depthwise_image<T, K, S>((const T*)x.const_data_ptr(), s, win, (const float*)expand.const_data_ptr(),
                                      floats(ones), before, channels, weight.data(), sink_of);
    });
  });
  return {z, pooled};
}

}  // namespace effnet_fast
