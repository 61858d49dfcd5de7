// Training without the expanded tensor e = x W', six times as large as x: a sweep forward from x to the depthwise
// convolution's output y, and one back from y's gradient to x's, which compute e strip by strip in cache.
//
// The BatchNorm between the two needs e's statistics before there is an e. With x's mean m and covariance C over P pixels,
//     mean(e) = W m,  var(e) = diag(W C W').
// Backward, with u = BN(e), g = dL/du, r = 1 / sqrt(var(e) + eps), scale = weight * r:
//     de = scale * (g - m1 - (e - mean(e)) * r * m2),  m1 = mean(g),  m2 = mean(g * (e - mean(e)) * r),
// whose last two terms are linear in x. The sweep gives (scale g) W and, summed over pixels, G = g' x and s = sum g; then
//     m1 = s / P,  m2 = r * (rowsum(G * W) - mean(e) * s) / P,
//     dx = (scale g) W + (x - m) M - (scale m1) W,  M = -W' diag(scale r m2) W,
//     dW = scale * (G - s m' - P r m2 (W C)),  dweight = P m2,  dbias = s.
// W is everywhere what the products round it to, and s sums g as rounded: G and s m', x M and m M nearly cancel.
//
// Emerald Rapids, two cores, bf16 in tiles, in turns with the passes that store e: forward and backward, batch 16, 20.0 for
// 26.3 ms (16 to 96 channels at 112 px), 10.6 for 11.9 (24 to 144 at 56 px), 8.4 for 8.8 (40 to 240 at 28 px), but 5.8 for 5.4
// at 14 px, where what is as large as the weights rules. A training step of B0 at 224 px takes 0.93 of the time.
#pragma once

#include "depthwise_backward.h"
#include "expand_depthwise.h"
#include "squeeze.h"

namespace effnet_fast {

// f(first channel, lanes) for the vectors of so many channels.
template <class F>
inline void for_each_vector(int64_t channels, const F& f) {
  for (int64_t v = 0; v * kLanes < channels; ++v) with_lanes(v, channels, [&](auto lanes) { f(v * kLanes, lanes); });
}

// What products with activations of a dtype make of such weights.
inline std::vector<float> as_multiplied(const float* weights, int64_t count, ScalarType dtype) {
  std::vector<float> values(weights, weights + count);
  if (dtype == ScalarType::BFloat16)
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec value = rounded<BFloat16>(load_first(weights + i, count - i));
      std::memcpy(&values[i], &value, std::min<int64_t>(kLanes, count - i) * sizeof(float));
    }
  return values;
}

// Threads that share the images, or the chunks of pixels, each with sums of its own.
inline int64_t sharing_threads(int64_t parts) {
  return std::clamp<int64_t>(torch::stable::get_num_threads(), 1, std::max<int64_t>(parts, 1));
}

// [1 + C, C]: x's mean over its pixels, and its covariance.
inline Tensor input_moments(const Tensor& x) {
  const Shape s = check_nhwc(x, "x");
  const PixelChunks chunks(s);
  const int64_t threads = sharing_threads(chunks.count);
  const int64_t row = s.vectors() * kLanes, rows = whole_tiles<ProductWords<BFloat16>>(s.c);
  Tensor moments = empty_floats({1 + s.c, s.c}), partial = empty_floats({threads, rows, row});
  std::vector<double> sums(threads * s.c);
  std::vector<float> center(row);  // about the mean, so that a large one does not cancel
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using W = ProductWords<T>;
    const T* in = (const T*)x.const_data_ptr();
    const int64_t sample = std::min<int64_t>(s.n * s.pixels(), 64);
    for_each_vector(s.c, [&](int64_t c, auto lanes) {
      Vec sum = {};
      for (int64_t pixel = 0; pixel < sample; ++pixel) sum += load(in + pixel * s.c + c, lanes);
      store(&center[c], rounded<T>(sum / (float)std::max<int64_t>(sample, 1)));
    });
    for_each_task(threads, [&](int64_t thread) {
      constexpr int64_t kRows = 256 / W::kRows * W::kRows;
      const int64_t room = product_words<W>(kRows), transposed_row = padded_row(room);
      float* pairs = scratch(room * row + rows * transposed_row);
      float* transposed = pairs + room * row;
      float* products = floats(partial) + thread * rows * row;
      double* sum = &sums[thread * s.c];
      [[maybe_unused]] const ProductRegisters<W> registers;
      bool add = false;
      for (int64_t chunk = chunks.count * thread / threads; chunk < chunks.count * (thread + 1) / threads; ++chunk)
        chunks.for_each_block<W>(chunk, kRows, [&](const Block& block) {
          const int64_t words = words_of<W>(block.rows), summed = product_words<W>(block.rows);
          for_each_vector(s.c, [&](int64_t c, auto lanes) {
            const Vec middle = load(&center[c]);
            Vec before = {}, total = {};
            write_pairs<W>(pairs + c, row, 0, block.rows, block.rows, before, [&](int64_t r) {
              const T* from = in + (block.begin + r) * s.c + c;
              prefetch_to_second_level(from + block.rows * s.c);
              const Vec value = load(from, lanes) - middle;
              total += value;
              return value;
            });
            for (int lane = 0; lane < lanes; ++lane) sum[c + lane] += total[lane];
          });
          std::memset(pairs + words * row, 0, (summed - words) * row * sizeof(float));
          const LeftOperand left = columns_as_rows<W>(pairs, row, words, s.c, transposed, transposed_row);
          for_each_panel(0, (s.vectors() + kPanelVectors - 1) / kPanelVectors, s.vectors(), [&]<int V>(int64_t panel) {
            const int64_t column = panel * kPanelColumns;
            multiply_panel<W, V>(s.c, summed, left.words, left.row, left.step, pairs + column, row, products + column, row,
                                 add);
          });
          add = true;
        });
      if (!add) std::memset(products, 0, rows * row * sizeof(float));
    });
  });
  const double pixels = (double)std::max<int64_t>(s.n * s.pixels(), 1);
  std::vector<double> beyond(s.c);  // of the mean, beyond the centre
  float *mean = floats(moments), *covariance = mean + s.c;
  for (int64_t c = 0; c < s.c; ++c) {
    for (int64_t thread = 0; thread < threads; ++thread) beyond[c] += sums[thread * s.c + c] / pixels;
    mean[c] = (float)(center[c] + beyond[c]);
  }
  const float* parts = floats(partial);
  for (int64_t i = 0; i < s.c; ++i)
    for (int64_t j = 0; j < s.c; ++j) {
      double sum = 0;
      for (int64_t thread = 0; thread < threads; ++thread) sum += parts[(thread * rows + i) * row + j];
      covariance[i * s.c + j] = (float)(sum / pixels - beyond[i] * beyond[j]);
    }
  return moments;
}

std::tuple<Tensor, Tensor, Tensor> expand_stats(const Tensor& x, const Tensor& weight) {
  const Shape s = check_nhwc(x, "x");
  check_pointwise(weight, s);
  const int64_t channels = weight.size(0), depth = s.c;
  const Tensor moments = input_moments(x);
  const float *center = floats(moments), *covariance = center + depth;
  const float pixels = (float)std::max<int64_t>(s.n * s.pixels(), 1);
  const std::vector<float> w = as_multiplied(as_floats(weight, "weight").data, channels * depth, x.scalar_type());
  Tensor mean = empty_floats({channels}), m2 = empty_floats({channels});
  float *means = floats(mean), *squares = floats(m2);
  std::vector<float> along(channels * depth);
  product<FloatWords>(w.data(), covariance, channels, depth, depth, [&](int64_t e, int64_t c, auto lanes, Vec sum) {
    store(&along[e * depth + c], sum, lanes);
  });
  for_each_range(channels, 2 * depth, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      Vec sum = {}, square = {};
      for_each_vector(depth, [&](int64_t c, auto lanes) {
        const Vec value = load(&w[e * depth + c], lanes);
        sum += value * load(center + c, lanes);
        square += value * load(&along[e * depth + c], lanes);
      });
      means[e] = sum_of_lanes(sum);
      squares[e] = std::max(0.f, sum_of_lanes(square)) * pixels;
    }
  });
  return {mean, m2, moments};
}

std::tuple<Tensor, Tensor, Tensor> expand_dwconv_stats(const Tensor& x, const Tensor& w_expand, const Tensor& scale,
                                                       const Tensor& shift, const Tensor& w_depthwise, int64_t stride,
                                                       bool same) {
  const Shape s = check_nhwc(x, "x"), expanded{s.n, w_expand.size(0), s.h, s.w}, image{1, s.c, s.h, s.w};
  check_pointwise(w_expand, s);
  const int64_t channels = expanded.c, vectors = expanded.vectors();
  const Window win = depthwise_window(expanded, w_depthwise, stride, same);
  const float *factor = check_floats(scale, "scale", channels), *offset = check_floats(shift, "shift", channels);
  const std::vector<float> taps = pack_depthwise(w_depthwise, expanded, win, x);
  const Tensor expand = pack_pointwise(w_expand, x);
  Tensor y = empty_nhwc({s.n, channels, win.out_h, win.out_w}, x.scalar_type());
  Tensor mean = empty_floats({channels}), m2 = empty_floats({channels});
  // a task is some neighbouring images: statistics do not depend on the number of threads
  const int64_t tasks = std::min<int64_t>(s.n, 64), pixels = win.out_h * win.out_w, row = win.out_w * channels;
  const auto first_image = [&](int64_t task) { return s.n * task / tasks; };
  const auto count = [&](int64_t task) { return (first_image(task + 1) - first_image(task)) * pixels; };
  std::vector<float> state(tasks * vectors * 3 * kLanes);
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* in = (const T*)x.const_data_ptr();
    T* out = (T*)y.mutable_data_ptr();
    dispatch_window(win, [&]<int K, int S>() {
      for_each_task(tasks, [&](int64_t task) {
        for (int64_t n = first_image(task); n < first_image(task + 1); ++n)
          expand_depthwise_image<T, K, S>(in + n * s.pixels() * s.c, image, win, floats(expand), factor, offset, channels,
                                          taps.data(), [&](int64_t c, auto lanes, int64_t oh) {
            float* mine = &state[(task * vectors + c / kLanes) * 3 * kLanes];
            T* to = out + n * pixels * channels + oh * row + c;
            const bool first = n == first_image(task) && oh == 0;
            return StatisticsSink<T, decltype(lanes)>{to,        channels,         lanes, mine,
                                                      win.out_w, kRowsAhead * row, first, load(mine)};
          });
      });
    });
  });
  combine_statistics(state, pixels > 0 ? tasks : 0, channels, count, floats(mean), floats(m2));
  return {y, mean, m2};
}

// Rows of an image that are swept together: enough pixels for the products' tiles, few enough for their operands to stay in
// the second-level cache.
inline int64_t strip_rows(const Shape& s) {
  constexpr int64_t kPixels = 224;  // 112 to 448 take as long
  const int64_t rows = std::clamp<int64_t>(kPixels / s.w, 1, s.h), strips = (s.h + rows - 1) / rows;
  return (s.h + strips - 1) / strips;
}

// What the sweep back leaves: (scale g) W [N, C, H, W], G [E, C] and s [E], all floats.
struct Swept {
  Tensor product, gram, sum;
};

template <class T, int K, int S>
inline void sweep_back(const T* grad, const T* y, const T* x, const Shape& s, const Window& win, int64_t channels,
                       const float* expand, const float* reduce, const float* reversed, const OutputGrad& output_grad,
                       const InputNorm& norm, int64_t threads, float* product, float* grams, float* weight_grads,
                       float* sums) {
  using W = Words<T>;
  using P = ProductWords<T>;
  constexpr int64_t kMargin = K;  // zero columns on either side
  const int64_t vectors = (channels + kLanes - 1) / kLanes, panels = (s.vectors() + kPanelVectors - 1) / kPanelVectors;
  const int64_t strip = strip_rows(s), max_pixels = (strip * s.w + P::kRows - 1) / P::kRows * P::kRows;
  const int64_t words = product_words<P>(s.c), row_words = padded_row(s.c);
  // rows of y's gradient that a strip meets, and between the strips of an image those that the next one meets as well
  const int64_t slots = std::min(win.out_h, (strip + K - 2) / S + 2), row_floats = (win.out_w + 2 * kMargin) * kLanes;
  const int64_t rings = strip < s.h ? vectors : 1, vector_floats = strip < s.h ? slots * row_floats : 0;
  const int64_t grad_size = GradProducts<BFloat16>::weight_grad_floats(s.c, channels);
  for_each_task(threads, [&](int64_t thread) {
    float* ring = scratch(rings * slots * row_floats + row_floats + 3 * s.w * kLanes +
                          max_pixels * (row_words + kPanelColumns) + GradProducts<T>::floats(s.c, channels, max_pixels));
    float* zeros = ring + rings * slots * row_floats;
    float* rows = zeros + row_floats;
    const InputRow row{rows, rows + s.w * kLanes, nullptr, rows + 2 * s.w * kLanes};
    float* x_rows = rows + 3 * s.w * kLanes;
    float* e_rows = x_rows + max_pixels * row_words;
    std::memset(ring, 0, (rings * slots + 1) * row_floats * sizeof(float));
    end_rows<P>(x_rows, max_pixels, row_words, s.c);
    GradProducts<T> products(s.c, channels, max_pixels, e_rows + max_pixels * kPanelColumns, reduce,
                             grams + thread * grad_size);
    const GatedInput as_it_is(std::nullopt, std::nullopt, std::nullopt, s);
    float* my_weight_grads = weight_grads + thread * vectors * K * K * kLanes;
    float* my_sums = sums + thread * vectors * kLanes;
    const int64_t first_image = s.n * thread / threads, last_image = s.n * (thread + 1) / threads - 1;
    for (int64_t n = first_image; n <= last_image; ++n) {
      int64_t filled = 0;
      for (int64_t top = 0; top < s.h; top += strip) {
        const int64_t bottom = std::min(top + strip, s.h), pixels = (bottom - top) * s.w;
        const int64_t needed = std::min((bottom - 1 + win.pad_h) / S + 1, win.out_h);
        const Block block{0, n * s.pixels() + top * s.w, pixels, true, true};

        // g of a vector of channels from e's, `stride` floats apart
        const auto form_vector = [&](const float* e, int64_t stride, int64_t c, auto lanes, float* g_rows, float* g_pairs,
                                     int64_t g_words) {
          float* dy = ring + c / kLanes * vector_floats + kMargin * kLanes;
          for (int64_t oh = filled; oh < needed; ++oh) {
            const int64_t at = (n * win.out_h + oh) * win.out_w * channels + c;
            fill_grad_row(grad + at, y + at, win.out_w, strip / S * win.out_w * channels, channels, n, c, lanes, output_grad,
                          dy + oh % slots * row_floats);
          }
          const float* taps = reversed + c * K * reversed_row_words<W, K, S>();
          float* weight_grad = my_weight_grads + c * K * K;
          const Vec scale = load(norm.scale + c, lanes), shift = load(norm.shift + c, lanes);
          Vec before = {}, sum = {};
          for (int64_t h = top; h < bottom; ++h, e += s.w * stride) {
            for (int64_t i = 0; i < s.w; ++i) {
              const Vec u = load(e + i * stride) * scale + shift, sig = sigmoid<T>(u), z = u * sig;
              store(row.activated + i * kLanes, z);
              store(row.slope + i * kLanes, silu_slope(sig, z));
            }
            backward_ring_row<W, K, S>(h, s.w, win, row, dy, slots, row_floats, zeros + kMargin * kLanes, taps, weight_grad);
            const int64_t first = (h - top) * s.w;
            const auto value = [&](int64_t r) {
              const int64_t at = (r - first) * kLanes;
              const Vec g = rounded<T>(load(row.grad + at) * load(row.slope + at));
              sum += g;
              P::store_row(g_rows + r * g_words, c, g);
              return g;
            };
            if constexpr (P::kDepth == 1)
              for (int64_t r = first; r < first + s.w; ++r) value(r);
            else
              write_pairs<P>(g_pairs + c, g_words, first, first + s.w, pixels, before, value);
          }
          store(my_sums + c, load(my_sums + c) + sum);
        };

        const auto form = [&](float* g_rows, float* g_pairs, int64_t g_words) {
          form_rows(x, s, block, as_it_is, x_rows, row_words);
          for_each_panel(0, (vectors + kPanelVectors - 1) / kPanelVectors, vectors, [&]<int V>(int64_t panel) {
            multiply_panel<P, V>(pixels, words, x_rows, row_words, 1, expand + panel * kPanelColumns * words, V * kLanes,
                                 e_rows, V * kLanes, false);
            for (int v = 0; v < V; ++v)
              with_lanes(panel * kPanelVectors + v, channels, [&](auto lanes) {
                form_vector(e_rows + v * kLanes, V * kLanes, (panel * kPanelVectors + v) * kLanes, lanes, g_rows, g_pairs,
                            g_words);
              });
          });
        };
        const auto emit = [&](const float* from, int64_t stride, int64_t c, auto lanes, float* activated) {
          float* to = product + block.begin * s.c + c;
          for (int64_t r = 0; r < pixels; ++r) store(to + r * s.c, load(from + r * stride), lanes);
          write_input(x, s, block, c, lanes, activated, stride);
        };
        products.add(pixels, n == last_image && bottom == s.h, 0, panels, form, emit);
        filled = needed;
      }
    }
  });
}

// Gradients of x (plus residual), w_expand [E, C, 1, 1], and the BatchNorm's [2, E] (weight, bias) from what was swept.
inline std::tuple<Tensor, Tensor, Tensor> expand_grad(const Swept& swept, const Tensor& x, const std::vector<float>& w,
                                                      const InputNorm& norm, const float* moments,
                                                      const OptionalTensor& residual) {
  const Shape s = check_nhwc(x, "x");
  const int64_t depth = s.c, channels = swept.sum.numel();
  const float *center = moments, *covariance = moments + depth;
  const float pixels = (float)std::max<int64_t>(s.n * s.pixels(), 1);
  const float *G = floats(swept.gram), *sum = floats(swept.sum);
  Tensor dx = empty_nhwc(s, x.scalar_type()), dweight = empty_floats({channels, depth, 1, 1});
  Tensor affine = empty_floats({2, channels});
  float *to_weight = floats(dweight), *dgamma = floats(affine), *dbeta = dgamma + channels;
  std::vector<float> bent(channels * depth);  // -diag(scale r m2) W
  for_each_range(channels, 4 * depth, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      Vec along = {};
      for_each_vector(depth, [&](int64_t c, auto lanes) {
        along += load(G + e * depth + c, lanes) * load(&w[e * depth + c], lanes);
      });
      dgamma[e] = norm.rstd[e] * (sum_of_lanes(along) - norm.mean[e] * sum[e]);
      dbeta[e] = sum[e];
      const float factor = -norm.scale[e] * norm.rstd[e] * dgamma[e] / pixels;
      for_each_vector(depth, [&](int64_t c, auto lanes) {
        store(&bent[e * depth + c], factor * load(&w[e * depth + c], lanes), lanes);
      });
    }
  });
  product<FloatWords>(bent.data(), covariance, channels, depth, depth, [&](int64_t e, int64_t c, auto lanes, Vec products) {
    const Vec around = load(G + e * depth + c, lanes) - sum[e] * load(center + c, lanes);
    store(to_weight + e * depth + c, norm.scale[e] * around + pixels * products, lanes);
  });

  std::vector<float> columns(depth * channels), through(depth * depth), constant(depth);  // W', M, -(scale m1) W - m M
  transpose(w.data(), channels, depth, columns.data());
  product<FloatWords>(columns.data(), bent.data(), depth, channels, depth, [&](int64_t i, int64_t c, auto lanes, Vec m) {
    store(&through[i * depth + c], m, lanes);
  });
  for (int64_t e = 0; e < channels; ++e) {
    const float m1 = norm.scale[e] * sum[e] / pixels;
    for (int64_t c = 0; c < depth; ++c) constant[c] -= m1 * w[e * depth + c];
  }
  const std::vector<float> multiplied = as_multiplied(through.data(), depth * depth, x.scalar_type());
  for (int64_t i = 0; i < depth; ++i)
    for (int64_t c = 0; c < depth; ++c) constant[c] -= center[i] * multiplied[i * depth + c];

  const float* products = floats(swept.product);
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Tensor panels = pack_panels<ProductWords<T>>(through.data(), depth, depth, depth, 1);
    const T* added = residual ? (const T*)residual->const_data_ptr() : nullptr;
    T* to = (T*)dx.mutable_data_ptr();
    const GatedInput as_it_is(std::nullopt, std::nullopt, std::nullopt, s);
    multiply_pixels((const T*)x.const_data_ptr(), s, as_it_is, panels, depth, PixelChunks(s),
                    [&](const Block& block, int64_t vector, const float* from, int64_t stride, float*) {
      with_lanes(vector, depth, [&](auto lanes) {
        const int64_t first = block.begin * depth + vector * kLanes, ahead = block.rows * depth;
        const Vec offset = load(&constant[vector * kLanes], lanes);
        for (int64_t r = 0; r < block.rows; ++r) {
          const int64_t at = first + r * depth;
          prefetch_to_second_level(products + at + ahead);
          Vec value = load(from + r * stride) + offset + load(products + at, lanes);
          if (added) {
            prefetch_to_second_level(added + at + ahead);
            value += load(added + at, lanes);
          }
          store(to + at, value, lanes);
        }
      });
    });
  });
  return {dx, dweight, affine};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_expand_dwconv(
    const Tensor& grad, const Tensor& y, const Tensor& x, const Tensor& w_expand, const Tensor& w_depthwise,
    const Tensor& scale, const Tensor& shift, const Tensor& mean, const OptionalTensor& gate,
    const OptionalTensor& pooled_grad, const Tensor& a, const Tensor& b, const Tensor& in_scale, const Tensor& in_shift,
    const Tensor& in_mean, const Tensor& in_rstd, const Tensor& moments, const OptionalTensor& residual, int64_t stride,
    bool same) {
  const Shape s = check_nhwc(x, "x"), expanded{s.n, w_expand.size(0), s.h, s.w};
  check_pointwise(w_expand, s);
  const int64_t channels = expanded.c, vectors = expanded.vectors();
  const Window win = depthwise_window(expanded, w_depthwise, stride, same);
  const Shape out = check_nhwc(grad, "grad");
  STD_TORCH_CHECK(out.n == s.n && out.c == channels && out.h == win.out_h && out.w == win.out_w,
                  "grad: must have the shape of the convolution's output");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad: must have the dtype of x");
  check_like(y, "y", grad, "grad");
  if (residual) check_like(*residual, "residual", x, "x");
  const OutputGrad output_grad(scale, shift, mean, gate, pooled_grad, a, b, true, true, out);
  const InputNorm norm{check_floats(in_scale, "in_scale", channels), check_floats(in_shift, "in_shift", channels),
                        check_floats(in_mean, "in_mean", channels), check_floats(in_rstd, "in_rstd", channels)};
  const float* given = check_floats(moments, "moments", s.c, 1 + s.c);
  const int64_t threads = sharing_threads(s.n), taps = win.kernel * win.kernel;
  const std::vector<int64_t> places = taps_of_weight(w_depthwise, win);
  const std::vector<float> reversed = pack_reversed(w_depthwise, expanded, win, x);
  const std::vector<float> w = as_multiplied(as_floats(w_expand, "w_expand").data, channels * s.c, x.scalar_type());
  std::vector<float> scaled = w;
  for (int64_t e = 0; e < channels; ++e)
    for (int64_t c = 0; c < s.c; ++c) scaled[e * s.c + c] *= norm.scale[e];

  const Swept swept{empty_nhwc(s, ScalarType::Float), empty_floats({channels, s.c}), empty_floats({channels})};
  Tensor dweight = empty_floats(w_depthwise.sizes());
  std::vector<float> weight_grads(threads * vectors * taps * kLanes), sums(threads * vectors * kLanes);
  const int64_t gram_size = GradProducts<BFloat16>::weight_grad_floats(s.c, channels);
  Tensor grams = empty_floats({threads, gram_size});
  if (s.n * s.pixels() == 0) std::memset(floats(grams), 0, grams.numel() * sizeof(float));
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Tensor expand = pack_pointwise(w_expand, x);
    const Tensor reduce = pack_panels<ProductWords<T>>(scaled.data(), channels, s.c, s.c, 1);
    dispatch_window(win, [&]<int K, int S>() {
      sweep_back<T, K, S>((const T*)grad.const_data_ptr(), (const T*)y.const_data_ptr(), (const T*)x.const_data_ptr(), s, win,
                          channels, floats(expand), floats(reduce), reversed.data(), output_grad, norm, threads,
                          floats(swept.product), floats(grams), weight_grads.data(), sums.data());
    });
  });
  sum_tap_grads(weight_grads, threads, channels, places, dweight);
  sum_weight_grads(grams, s.c, swept.gram);
  float* to_sum = floats(swept.sum);
  for_each_vector(channels, [&](int64_t c, auto lanes) {
    Vec sum = {};
    for (int64_t thread = 0; thread < threads; ++thread) sum += load(&sums[thread * vectors * kLanes + c]);
    store(to_sum + c, sum, lanes);
  });
  const auto [dx, dw_expand, affine] = expand_grad(swept, x, w, norm, given, residual);
  return {dx, dw_expand, dweight, affine};
}

}  // namespace effnet_fast
