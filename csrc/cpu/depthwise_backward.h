// Depthwise convolution, backward: one sweep over the input's rows gives the activation's gradient, the weight's
// gradient and the sums of the input's BatchNorm. The gradient of the convolution's output is formed on load from
// (grad, y) when a BatchNorm + SiLU (+ gate) follows, and kept in a ring of rows of words as in the forward pass.
#pragma once

#include <array>

#include "depthwise.h"
#include "output_grad.h"

namespace effnet_fast {

// Writes one row of the output's gradient for the channels from c on into a row of the ring. ahead, here and below: to the
// elements that are wanted next.
template <class T, class Lanes>
inline void fill_grad_row(const T* grad, const T* y, int64_t width, int64_t ahead, int64_t channels, int64_t n, int64_t c,
                          Lanes lanes, const OutputGrad& op, float* to) {
  using W = Words<T>;
  if (!op.scale) return write_columns<W>(to, width, [&](int64_t i) { return load(grad + i * channels, lanes); });
  const auto output_grad = op.of<T>(n, channels, c, lanes);
  write_columns<W>(to, width, [&](int64_t i) {
    prefetch(grad + i * channels + ahead);
    prefetch(y + i * channels + ahead);
    return output_grad(load(grad + i * channels, lanes), load(y + i * channels, lanes));
  });
}

// The BatchNorm + SiLU between the input x and the convolution, or nulls.
struct InputNorm {
  const float *scale, *shift, *mean, *rstd;
};

// One row of the input for one vector of channels, [column][lane] each.
struct InputRow {
  float *activated, *slope, *centered, *grad;
};

// Input rows that meet the kernel's rows PH, PH + S, ...: what they hold, and under each kernel row the output gradients,
// pointing at column 0; zeros outside of the image.
template <int K>
struct PhaseRows {
  float* const* activated;
  const std::array<const float*, K>* dy;
  int64_t count;
};

// Words of a kernel row in `pack_reversed`.
template <class W, int K, int S>
constexpr int reversed_row_words() {
  return S == 1 ? words_of<W>(K) : words_of<W>((K + 1) / 2) + words_of<W>(K / 2);
}

// Of the input columns of phase PW (of S): the kernel's taps and rows (of phase PH) that they meet, and where the words of
// these begin in `pack_reversed`, with floats from kernel row to kernel row of the phase.
template <class W, int K, int S, int PH, int PW>
struct Phase {
  static constexpr int kRows = (K - PH + S - 1) / S, kTaps = (K - PW + S - 1) / S;
  static constexpr int kSkipped = PW == 0 ? 0 : words_of<W>((K + S - 1) / S);  // of the phase before in a kernel row
  static constexpr int64_t kFirst = (PH * reversed_row_words<W, K, S>() + kSkipped) * kLanes;
  static constexpr int64_t kKernelRow = S * reversed_row_words<W, K, S>() * kLanes;
  static int64_t first_column(int64_t pad_w) { return ((PW - pad_w) % S + S) % S; }
};

// Gradients of the activated input, for the input columns of phase PW (of S) of one row. Input column iw meets the
// kernel's columns PW, PW + S, ... , and so the output columns last, last - 1, ... with last = (iw + pad_w) / S: a
// convolution of `dy` with the taps reversed. dy[j]: the row of output gradients under kernel row PH + S * j, pointing at
// column 0, or null. `reversed`: the weights' words with the order of each kernel row's columns reversed, phase after phase.
template <class W, int K, int S, int PH, int PW>
inline void input_grad_columns(int64_t width, int64_t pad_w, const float* const* dy, const float* reversed, float* out) {
  using P = Phase<W, K, S, PH, PW>;
  const int64_t iw = P::first_column(pad_w), last = (iw + pad_w) / S;
  if (iw >= width) return;
  const float* rows[P::kRows];
  for (int j = 0; j < P::kRows; ++j) rows[j] = dy[j] ? dy[j] + (last - P::kTaps + 1) * kLanes : nullptr;
  const auto sink = [&](int64_t i, Vec da) { store(out + (iw + i * S) * kLanes, da); };
  dw_row<W, P::kRows, P::kTaps, 1>(rows, reversed + P::kFirst, P::kKernelRow, (width - iw + S - 1) / S, sink);
}

// The same for the rows of small maps.
template <class W, int K, int S, int PH, int PW>
inline void small_input_grad_columns(int64_t width, int64_t pad_w, const PhaseRows<K>& rows, float* const* grads,
                                     const float* reversed) {
  using P = Phase<W, K, S, PH, PW>;
  const int64_t iw = P::first_column(pad_w), last = (iw + pad_w) / S;
  if (iw >= width || rows.count == 0) return;
  dw_small_rows<W, P::kRows, P::kTaps, 1>(rows.dy->data(), K, rows.count, (width - iw + S - 1) / S, last - P::kTaps + 1,
                                          reversed + P::kFirst, P::kKernelRow, grads, iw, S);
}

// Adds input rows' products to the weight's gradient, for `Rows` kernel rows from PH + S * first on: input column iw
// meets the output columns as above. A word of the input is a column and the next of its phase, which meets the next output
// column.
template <class W, int K, int S, int PH, int Rows>
inline void weight_grad_rows(int64_t width, int64_t pad_w, const PhaseRows<K>& rows, int first, float* weight_grad) {
  Vec acc[Rows * K] = {};
  const auto word = [&]<int PW>(const float* activated, const std::array<const float*, K>& dy, int64_t iw) {
    if (iw >= width) return;
    const int64_t next = iw + S, last = (iw + pad_w) / S;
    const Vec a = W::pair(load(activated + iw * kLanes), next < width ? load(activated + next * kLanes) : Vec{});
#pragma GCC unroll 8
    for (int j = 0; j < Rows; ++j) {
      const float* at = dy[first + j] + last * kLanes;
      asm("" : "+r"(at));  // as in dw_columns
#pragma GCC unroll 8
      for (int i = 0; PW + S * i < K; ++i) {
        Vec& sum = acc[j * K + PW + S * i];
        sum = W::multiply_add(a, load(at - i * kLanes), sum);
      }
    }
  };
  const auto words = [&]<int... PW>() {
    for (int64_t row = 0; row < rows.count; ++row)
      for (int64_t iw = 0; iw < width; iw += S * W::kDepth) {
        int64_t column = iw;
        (word.template operator()<PW>(rows.activated[row], rows.dy[row], column++), ...);
      }
  };
  if constexpr (S == 1)
    words.template operator()<0>();
  else if (pad_w % 2 == 0)
    words.template operator()<0, 1>();
  else
    words.template operator()<1, 0>();
#pragma GCC unroll 8
  for (int j = 0; j < Rows; ++j)
#pragma GCC unroll 8
    for (int kw = 0; kw < K; ++kw) {
      float* sum = weight_grad + ((PH + S * (first + j)) * K + kw) * kLanes;
      store(sum, load(sum) + acc[j * K + kw]);
    }
}

template <class W, int K, int S, int PH>
inline void weight_grad_of_rows(int64_t width, int64_t pad_w, const PhaseRows<K>& rows, float* weight_grad) {
  // as many kernel rows at once as the register file holds the sums of
  constexpr int kRows = (K - PH + S - 1) / S, kRegisters = kLanes == 16 ? 28 : 14;
  constexpr int kTogether = std::min(kRows, std::max(1, kRegisters / K)), kRest = kRows % kTogether;
  for (int first = 0; first + kTogether <= kRows; first += kTogether)
    weight_grad_rows<W, K, S, PH, kTogether>(width, pad_w, rows, first, weight_grad);
  if constexpr (kRest > 0) weight_grad_rows<W, K, S, PH, kRest>(width, pad_w, rows, kRows - kRest, weight_grad);
}

// Everything that the gradients `dy` bring to one input row in kernel rows PH, PH + S, ...
template <class W, int K, int S, int PH>
inline void backward_row(int64_t width, int64_t pad_w, const InputRow& row, const float* const* dy, const float* zeros,
                         const float* reversed, float* weight_grad) {
  input_grad_columns<W, K, S, PH, 0>(width, pad_w, dy, reversed, row.grad);
  if constexpr (S == 2) input_grad_columns<W, K, S, PH, 1>(width, pad_w, dy, reversed, row.grad);
  std::array<const float*, K> present;
  for (int j = 0; j < K; ++j) present[j] = dy[j] ? dy[j] : zeros;
  weight_grad_of_rows<W, K, S, PH>(width, pad_w, {&row.activated, &present, 1}, weight_grad);
}

// The same of input row h, whichever kernel rows it meets. ring: the gradients' rows, of output row oh at oh % slots, each
// pointing at column 0.
template <class W, int K, int S>
inline void backward_ring_row(int64_t h, int64_t width, const Window& win, const InputRow& row, const float* ring,
                              int64_t slots, int64_t row_floats, const float* zeros, const float* reversed,
                              float* weight_grad) {
  const float* dy[K];
  for (int j = 0; j < K; ++j) {
    const int64_t oh = (h + win.pad_h) / S - j;
    dy[j] = oh < 0 || oh >= win.out_h ? nullptr : ring + oh % slots * row_floats;
  }
  if ((h + win.pad_h) % S == 0)
    backward_row<W, K, S, 0>(width, win.pad_w, row, dy, zeros, reversed, weight_grad);
  else
    backward_row<W, K, S, S - 1>(width, win.pad_w, row, dy, zeros, reversed, weight_grad);
}

template <class T, class Lanes>
inline void load_input_row(const T* x, int64_t width, int64_t ahead, int64_t channels, int64_t c, Lanes lanes,
                           const InputNorm& norm, const InputRow& row) {
  if (!norm.scale) {
    for (int64_t i = 0; i < width; ++i) store(row.activated + i * kLanes, load(x + i * channels, lanes));
    return;
  }
  const Vec scale = load(norm.scale + c, lanes), shift = load(norm.shift + c, lanes), mean = load(norm.mean + c, lanes);
  for (int64_t i = 0; i < width; ++i) {
    prefetch(x + i * channels + ahead);
    const Vec value = load(x + i * channels, lanes), u = value * scale + shift, s = sigmoid<T>(u), z = u * s;
    store(row.activated + i * kLanes, z);
    store(row.slope + i * kLanes, silu_slope(s, z));
    store(row.centered + i * kLanes, value - mean);
  }
}

// Writes a row of gradients in storage precision; sums them, as rounded, and their products with the centred input.
template <class T, class Lanes>
inline void store_grad_row(const InputRow& row, int64_t width, int64_t ahead, int64_t channels, Lanes lanes, bool normed,
                           T* out, float* sums) {
  Vec sum = {}, product = {};
  for (int64_t i = 0; i < width; ++i) {
    Vec g = load(row.grad + i * kLanes);
    if (normed) g *= load(row.slope + i * kLanes);
    prefetch_to_write(out + i * channels + ahead);
    store(out + i * channels, g, lanes);
    if (normed) {
      g = rounded<T>(g);
      sum += g;
      product += g * load(row.centered + i * kLanes);
    }
  }
  store(sums, load(sums) + sum);
  store(sums + kLanes, load(sums + kLanes) + product);
}

// The window's weights as words, with each kernel row's columns in the order that `input_grad_columns` reads: those of phase
// 0 from last to first, then those of phase 1.
inline std::vector<float> pack_reversed(const Tensor& weight, const Shape& s, const Window& win, const Tensor& x) {
  const std::vector<float> taps = order_taps(weight, s, win);
  std::vector<float> reversed(taps.size());
  std::vector<int64_t> order;
  for (int64_t phase = 0; phase < win.stride; ++phase)
    for (int64_t kw = win.kernel - 1; kw >= 0; --kw)
      if (kw % win.stride == phase) order.push_back(kw);
  for (size_t row = 0; row < taps.size(); row += win.kernel * kLanes)
    for (int64_t i = 0; i < win.kernel; ++i)
      std::memcpy(&reversed[row + i * kLanes], &taps[row + order[i] * kLanes], kLanes * sizeof(float));
  return pack_taps(reversed, win.kernel, win.stride, x);
}

// `depthwise_backward` of small maps.
template <class T, int K, int S>
inline void depthwise_backward_small(const T* grad, const T* y, const T* x, const Shape& s, const Window& win,
                                     const float* reversed, const OutputGrad& output_grad, const InputNorm& norm,
                                     const DepthwiseTasks& tasks, T* dx, float* weight_grads, float* sums) {
  using W = Words<T>;
  constexpr int64_t kMargin = K, kLine = 64 / sizeof(T);
  const int64_t row_floats = (win.out_w + 2 * kMargin) * kLanes, together = small_images(s), pixels = s.pixels();
  tasks.run([&](int64_t group, int64_t first, int64_t count) {
    float* dy = scratch((together * win.out_h + 1) * row_floats + 4 * together * pixels * kLanes) + kMargin * kLanes;
    float* zeros = dy + together * win.out_h * row_floats;
    float* rows = zeros + row_floats - kMargin * kLanes;
    const int64_t of_pixels = together * pixels * kLanes;
    const InputRow all{rows, rows + of_pixels, rows + 2 * of_pixels, rows + 3 * of_pixels};
    std::memset(dy - kMargin * kLanes, 0, (together * win.out_h + 1) * row_floats * sizeof(float));
    // rows by phase, so many of each image
    std::vector<float*> activated[S], grads[S];
    std::vector<std::array<const float*, K>> under[S];
    int64_t an_image[S] = {};
    for (int64_t row = 0; row < together * s.h; ++row) {
      const int64_t h = row % s.h, last = (h + win.pad_h) / S, phase = (h + win.pad_h) % S;
      an_image[phase] += row < s.h;
      activated[phase].push_back(all.activated + row * s.w * kLanes);
      grads[phase].push_back(all.grad + row * s.w * kLanes);
      std::array<const float*, K>& met = under[phase].emplace_back();
      for (int j = 0; j < K; ++j) {
        const int64_t oh = last - j;
        met[j] = oh < 0 || oh >= win.out_h ? zeros : dy + (row / s.h * win.out_h + oh) * row_floats;
      }
    }
    for (int64_t n = tasks.group_begin(group); n < tasks.group_begin(group + 1); n += together) {
      const int64_t images = std::min(together, tasks.group_begin(group + 1) - n);
      for (int64_t v = first; v < first + count; ++v)
        with_lanes(v, s.c, [&](auto lanes) {
          const int64_t c = v * kLanes, at = n * pixels * s.c + c;
          for (int64_t row = 0; row < images * win.out_h; ++row) {
            const int64_t from = (n * win.out_h + row) * win.out_w * s.c + c;
            fill_grad_row(grad + from, y + from, win.out_w, kLine, s.c, n + row / win.out_h, c, lanes, output_grad,
                          dy + row * row_floats);
          }
          load_input_row(x + at, images * pixels, kLine, s.c, c, lanes, norm, all);
          const float* w = reversed + v * K * reversed_row_words<W, K, S>() * kLanes;
          float* weight_grad = weight_grads + (group * s.vectors() + v) * K * K * kLanes;
          const auto phase = [&]<int PH>() {
            const PhaseRows<K> of_phase{activated[PH].data(), under[PH].data(), images * an_image[PH]};
            small_input_grad_columns<W, K, S, PH, 0>(s.w, win.pad_w, of_phase, grads[PH].data(), w);
            if constexpr (S == 2) small_input_grad_columns<W, K, S, PH, 1>(s.w, win.pad_w, of_phase, grads[PH].data(), w);
            weight_grad_of_rows<W, K, S, PH>(s.w, win.pad_w, of_phase, weight_grad);
          };
          phase.template operator()<0>();
          if constexpr (S == 2) phase.template operator()<1>();
          store_grad_row(all, images * pixels, kLine, s.c, lanes, norm.scale != nullptr, dx + at,
                         sums + (group * s.vectors() + v) * 2 * kLanes);
        });
    }
  });
}

template <class T, int K, int S>
inline void depthwise_backward(const T* grad, const T* y, const T* x, const Shape& s, const Window& win,
                               const float* reversed, const OutputGrad& output_grad, const InputNorm& norm,
                               const DepthwiseTasks& tasks, T* dx, float* weight_grads, float* sums) {
  if (is_small(s))
    return depthwise_backward_small<T, K, S>(grad, y, x, s, win, reversed, output_grad, norm, tasks, dx, weight_grads, sums);
  using W = Words<T>;
  constexpr int kRows = K <= 3 ? 4 : 8;
  // Input rows that are done for a vector of channels before the next vector: those that the ring holds all gradients of.
  // They then come from the second-level cache once, not once for each of them (Zen 5, 5x5 at 14 px, cycles a vector: 110
  // to 82).
  constexpr int64_t kTogether = S == 1 ? kRows - K + 1 : 2 * (kRows - (K + 1) / 2);
  constexpr int64_t kMargin = K;  // zero columns on either side
  const int64_t ahead = kTogether * s.w * s.c;
  const int64_t row_floats = (win.out_w + 2 * kMargin) * kLanes, vector_floats = kRows * row_floats;
  tasks.run([&](int64_t group, int64_t first, int64_t count) {
    float* ring = scratch(count * vector_floats + row_floats + 4 * s.w * kLanes);
    float* zeros = ring + count * vector_floats;
    float* rows = zeros + row_floats;
    const InputRow row{rows, rows + s.w * kLanes, rows + 2 * s.w * kLanes, rows + 3 * s.w * kLanes};
    std::memset(ring, 0, (count * vector_floats + row_floats) * sizeof(float));
    float* group_weight_grad = weight_grads + (group * s.vectors() + first) * K * K * kLanes;
    float* group_sums = sums + (group * s.vectors() + first) * 2 * kLanes;
    for (int64_t n = tasks.group_begin(group); n < tasks.group_begin(group + 1); ++n) {
      int64_t filled = 0;
      for (int64_t top = 0; top < s.h; top += kTogether) {
        const int64_t bottom = std::min(top + kTogether, s.h);
        for (; filled <= std::min((bottom - 1 + win.pad_h) / S, win.out_h - 1); ++filled) {
          const int64_t at = (n * win.out_h + filled) * win.out_w * s.c;
          float* to = ring + filled % kRows * row_floats + kMargin * kLanes;
          for (int64_t v = 0; v < count; ++v)
            with_lanes(first + v, s.c, [&](auto lanes) {
              const int64_t c = (first + v) * kLanes;
              fill_grad_row(grad + at + c, y + at + c, win.out_w, kTogether / S * win.out_w * s.c, s.c, n, c, lanes,
                            output_grad, to + v * vector_floats);
            });
        }
        for (int64_t v = 0; v < count; ++v)
          with_lanes(first + v, s.c, [&](auto lanes) {
            const int64_t c = (first + v) * kLanes;
            const float* w = reversed + (first + v) * K * reversed_row_words<W, K, S>() * kLanes;
            const float* none = zeros + kMargin * kLanes;
            float* weight_grad = group_weight_grad + v * K * K * kLanes;
            for (int64_t h = top; h < bottom; ++h) {
              const int64_t at = (n * s.h + h) * s.w * s.c + c;
              load_input_row(x + at, s.w, ahead, s.c, c, lanes, norm, row);
              backward_ring_row<W, K, S>(h, s.w, win, row, ring + v * vector_floats + kMargin * kLanes, kRows, row_floats,
                                         none, w, weight_grad);
              store_grad_row(row, s.w, ahead, s.c, lanes, norm.scale != nullptr, dx + at, group_sums + v * 2 * kLanes);
            }
          });
      }
    }
  });
}

// to [C, 1, k, k] = the sums of so many parts [vector][tap][lane]. places: of `taps_of_weight`; the others are zero.
inline void sum_tap_grads(const std::vector<float>& parts, int64_t count, int64_t channels, const std::vector<int64_t>& places,
                          const Tensor& to) {
  const int64_t vectors = (channels + kLanes - 1) / kLanes, taps = places.size(), all = to.size(2) * to.size(3);
  float* out = floats(to);
  if (taps < all) std::memset(out, 0, to.numel() * sizeof(float));
  torch::stable::parallel_for(0, vectors, 4, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v)
      for (int64_t tap = 0; tap < taps; ++tap) {
        Vec sum = {};
        for (int64_t part = 0; part < count; ++part) sum += load(&parts[((part * vectors + v) * taps + tap) * kLanes]);
        for (int lane = 0; lane < std::min<int64_t>(kLanes, channels - v * kLanes); ++lane)
          out[(v * kLanes + lane) * all + places[tap]] = sum[lane];
      }
  });
}

std::tuple<Tensor, Tensor, Tensor> backward_dwconv(
    const Tensor& grad, const OptionalTensor& y, const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
    const OptionalTensor& shift, const OptionalTensor& mean, const OptionalTensor& gate,
    const OptionalTensor& pooled_grad, const OptionalTensor& a, const OptionalTensor& b, const OptionalTensor& in_scale,
    const OptionalTensor& in_shift, const OptionalTensor& in_mean, const OptionalTensor& in_rstd, int64_t stride,
    bool same) {
  const Shape s = check_nhwc(x, "x");
  const Window win = depthwise_window(s, weight, stride, same);
  const Shape out = check_nhwc(grad, "grad");
  STD_TORCH_CHECK(out.n == s.n && out.c == s.c && out.h == win.out_h && out.w == win.out_w,
                  "grad: must have the shape of the convolution's output");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad: must have the dtype of x");
  if (y) check_like(*y, "y", grad, "grad");
  const OutputGrad output_grad(scale, shift, mean, gate, pooled_grad, a, b, true, y.has_value(), s);
  const InputNorm norm{check_floats(in_scale, "in_scale", s.c), check_floats(in_shift, "in_shift", s.c),
                       check_floats(in_mean, "in_mean", s.c), check_floats(in_rstd, "in_rstd", s.c)};
  STD_TORCH_CHECK(!norm.scale || (norm.shift && norm.mean && norm.rstd),
                  "in_scale: needs in_shift, in_mean and in_rstd as well");
  const int64_t taps = win.kernel * win.kernel;
  const std::vector<int64_t> places = taps_of_weight(weight, win);
  const DepthwiseTasks tasks(s, forward_bytes_per_vector({s.n, s.c, win.out_h, win.out_w}, win));
  const std::vector<float> reversed = pack_reversed(weight, s, win, x);
  std::vector<float> weight_grads(tasks.groups * s.vectors() * taps * kLanes);
  std::vector<float> sums(tasks.groups * s.vectors() * 2 * kLanes);
  Tensor dx = empty_nhwc(s, x.scalar_type()), dweight = empty_floats(weight.sizes());
  Tensor norm_sums = empty_floats({2, s.c});
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dispatch_window(win, [&]<int K, int S>() {
      depthwise_backward<T, K, S>((const T*)grad.const_data_ptr(), y ? (const T*)y->const_data_ptr() : nullptr,
                                  (const T*)x.const_data_ptr(), s, win, reversed.data(), output_grad, norm, tasks,
                                  (T*)dx.mutable_data_ptr(), weight_grads.data(), sums.data());
    });
  });
  sum_tap_grads(weight_grads, tasks.groups, s.c, places, dweight);
  torch::stable::parallel_for(0, s.vectors(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v)
      with_lanes(v, s.c, [&](auto lanes) {
        const auto total = [&](int64_t i) {
          Vec sum = {};
          for (int64_t group = 0; group < tasks.groups; ++group)
            sum += load(&sums[((group * s.vectors() + v) * 2 + i) * kLanes]);
          return sum;
        };
        float* to = floats(norm_sums) + v * kLanes;
        store(to, total(0), lanes);
        store(to + s.c, norm.scale ? total(1) * load(norm.rstd + v * kLanes, lanes) : Vec{}, lanes);
      });
  });
  return {dx, dweight, norm_sums};
}

}  // namespace effnet_fast
