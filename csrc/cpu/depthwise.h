// Depthwise convolution, forward. Input rows are activated once, as they arrive, into a ring of rows in cache; each output
// row is then a sum over k rows of the ring. Layout of the ring: [vector][row][column][lane], with zero columns as padding,
// so that the inner loop reads consecutive memory and has no edges. An element of the ring is a word: where the processor
// multiplies pairs of bf16, a column and its right neighbour, which two taps meet at once (Zen 5, 5x5 at 28 px, bf16, cycles
// a vector: forward 33 to 28, backward 68 to 56). The last of an odd number of taps is a pair with a tap of zero.
#pragma once

#include "matmul.h"
#include "window.h"

namespace effnet_fast {

inline Window depthwise_window(const Shape& s, const Tensor& weight, int64_t stride, bool same) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == s.c && weight.size(1) == 1 && weight.size(2) == weight.size(3),
                  "weight: must be [", s.c, ", 1, k, k]");
  Window win = make_window(s.h, s.w, weight.size(2), stride, same);
  // Of a map smaller than the kernel, the outer taps only ever meet the padding: a 5 x 5 kernel is one of 3 x 3 on a map of
  // 2 x 2 pixels, and a factor on one of a single pixel (B0 at 32 px, a training step: depthwise passes 8.4 to 7.4 ms).
  const int64_t reach = 2 * std::max(s.h, s.w) - 1;
  if (stride == 1 && win.kernel > reach) {
    win.kernel = reach;
    win.pad_h = win.pad_w = reach / 2;
  }
  return win;
}

// Calls f.template operator()<K, S>().
template <class F>
inline void dispatch_window(const Window& w, F&& f) {
  if (w.kernel == 1) return f.template operator()<1, 1>();
  if (w.kernel == 3) return w.stride == 1 ? f.template operator()<3, 1>() : f.template operator()<3, 2>();
  if (w.kernel == 5) return w.stride == 1 ? f.template operator()<5, 1>() : f.template operator()<5, 2>();
  return w.stride == 1 ? f.template operator()<7, 1>() : f.template operator()<7, 2>();
}

// How the work is cut: a task is a block of channel vectors of a group of images: enough tasks for many threads, but none
// so small that combining the tasks' sums would rule (small images). The cut follows from the shape alone, so that
// results do not depend on the number of threads.
struct DepthwiseTasks {
  int64_t images, vectors, block, blocks, groups;

  // bytes_per_vector: what a task keeps in cache for each vector of channels.
  DepthwiseTasks(const Shape& s, int64_t bytes_per_vector) : images(s.n), vectors(s.vectors()) {
    constexpr int64_t kCacheBytes = 256 << 10, kMaxTasks = 64, kMinVectors = 8192, kFewTasks = 4, kFewestVectors = 1024;
    const int64_t fit = std::max<int64_t>(1, std::min(vectors, kCacheBytes / bytes_per_vector));
    const int64_t total = images * s.pixels() * vectors, few = std::min(kFewTasks, total / kFewestVectors);
    const int64_t wanted = std::clamp<int64_t>(std::max(total / kMinVectors, few), 1, kMaxTasks);
    blocks = (vectors + fit - 1) / fit;
    groups = std::min(images, (wanted + blocks - 1) / std::max<int64_t>(blocks, 1));
    if (groups > 0) blocks = std::clamp((few + groups - 1) / groups, blocks, vectors);  // few images, one perhaps
    block = (vectors + blocks - 1) / std::max<int64_t>(blocks, 1);
  }
  int64_t group_begin(int64_t group) const { return images * group / groups; }
  int64_t group_images(int64_t group) const { return group_begin(group + 1) - group_begin(group); }

  // f(group, first vector, number of vectors)
  template <class F>
  void run(const F& f) const {
    for_each_task(blocks * groups, [&](int64_t task) {
      const int64_t first = task / groups * block;
      if (first < vectors) f(task % groups, first, std::min(block, vectors - first));
    });
  }
};

// For every tap of the window's kernel, which may be the middle of a larger one, its place among the weight's [k, k].
inline std::vector<int64_t> taps_of_weight(const Tensor& weight, const Window& win) {
  const int64_t k = weight.size(2), skipped = (k - win.kernel) / 2;
  std::vector<int64_t> taps;
  for (int64_t row = 0; row < win.kernel; ++row)
    for (int64_t column = 0; column < win.kernel; ++column) taps.push_back((skipped + row) * k + skipped + column);
  return taps;
}

// The window's weights, of any storage type, as fp32 [vector][tap][lane].
inline std::vector<float> order_taps(const Tensor& weight, const Shape& s, const Window& win) {
  const std::vector<int64_t> taps = taps_of_weight(weight, win);
  const int64_t count = taps.size(), all = weight.size(2) * weight.size(3);
  std::vector<float> packed(s.vectors() * count * kLanes);
  const FloatWeights w = as_floats(weight, "weight");
  for (int64_t c = 0; c < s.c; ++c) {
    const float* from = w.data + c * all;
    float* to = packed.data() + c / kLanes * count * kLanes + c % kLanes;
    for (int64_t tap = 0; tap < count; ++tap) to[tap * kLanes] = from[taps[tap]];
  }
  return packed;
}

// Taps [row of the kernel][column][lane] as the words that meet an input of x's type. Those of a kernel row are `runs` runs,
// one behind the other, of the columns 0, runs, ..., then 1, 1 + runs, ...: words don't reach from run to run.
inline std::vector<float> pack_taps(const std::vector<float>& taps, int64_t kernel, int64_t runs, const Tensor& x) {
  std::vector<float> words;
  words.reserve(taps.size());
  dispatch(x, "x", [&](auto* type) {
    using W = Words<std::remove_pointer_t<decltype(type)>>;
    for (const float* row = taps.data(); row != taps.data() + taps.size(); row += kernel * kLanes)
      for (int64_t run = 0, begin = 0; run < runs; ++run) {
        const int64_t end = begin + (kernel - run + runs - 1) / runs;
        for (int64_t i = begin; i < end; i += W::kDepth) {
          words.resize(words.size() + kLanes);
          const Vec next = i + 1 < end ? load(row + (i + 1) * kLanes) : Vec{};
          store(&words[words.size() - kLanes], W::pair(load(row + i * kLanes), next));
        }
        begin = end;
      }
  });
  return words;
}

// The window's weights as words: [vector][kernel row][word][lane].
inline std::vector<float> pack_depthwise(const Tensor& weight, const Shape& s, const Window& win, const Tensor& x) {
  return pack_taps(order_taps(weight, s, win), win.kernel, 1, x);
}

// Writes a row of columns as words, the first at `to`; one that is two columns is also at to - kLanes, with nothing on its
// left.
template <class W, class Value>
inline void write_columns(float* to, int64_t width, const Value& value) {
  if constexpr (W::kDepth == 1) {
    for (int64_t i = 0; i < width; ++i) store(to + i * kLanes, value(i));
  } else {
    Vec before = {};
    for (int64_t i = 0; i < width; ++i) {
      const Vec next = value(i);
      store(to + (i - 1) * kLanes, W::pair(before, next));
      before = next;
    }
    store(to + (width - 1) * kLanes, W::pair(before, Vec{}));
  }
}

// Sums of products for T neighbouring outputs of one row. rows[i] is the i-th input row under the kernel, or null outside
// of the image; words of kernel row i begin at weight + i * kernel_row. Consecutive outputs are S columns apart.
template <class W, int Rows, int Taps, int S, int T, class Sink>
inline void dw_columns(const float* const* rows, const float* weight, int64_t kernel_row, int64_t ow, Sink& sink) {
  Vec acc[T] = {};
  for (int i = 0; i < Rows; ++i) {
    if (!rows[i]) continue;
    const float *row = rows[i] + ow * S * kLanes, *words = weight + i * kernel_row;
#pragma GCC unroll 8
    for (int word = 0; word < words_of<W>(Taps); ++word) {
      // Hidden from the compiler, which would else keep the columns that taps share in registers, and spill the sums: of
      // the 5x5 backward pass, 84 cycles a vector became 70.
      const float* at = row + word * W::kDepth * kLanes;
      asm("" : "+r"(at));
      const Vec w = load(words + word * kLanes);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) acc[t] = W::multiply_add(w, load(at + t * S * kLanes), acc[t]);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) sink(ow + t, acc[t]);
}

template <class W, int Rows, int Taps, int S, class Sink>
inline void dw_row(const float* const* rows, const float* weight, int64_t kernel_row, int64_t out_w, Sink& sink) {
  constexpr int kWide = kLanes == 16 ? 14 : 7;  // accumulators that fit in the register file: B0's widths are 7 * 2^i
  constexpr int kHalves = kLanes == 16 ? 16 : 8;  // a width that better falls into eights
  int64_t ow = 0;
  for (; out_w - ow >= kWide && out_w - ow != kHalves; ow += kWide)
    dw_columns<W, Rows, Taps, S, kWide>(rows, weight, kernel_row, ow, sink);
  for (; out_w - ow >= 8; ow += 8) dw_columns<W, Rows, Taps, S, 8>(rows, weight, kernel_row, ow, sink);
  if constexpr (kWide > 7)
    for (; out_w - ow >= 7; ow += 7) dw_columns<W, Rows, Taps, S, 7>(rows, weight, kernel_row, ow, sink);
  for (; out_w - ow >= 4; ow += 4) dw_columns<W, Rows, Taps, S, 4>(rows, weight, kernel_row, ow, sink);
  for (; ow < out_w; ++ow) dw_columns<W, Rows, Taps, S, 1>(rows, weight, kernel_row, ow, sink);
}

// As dw_columns, for R rows of outputs at once: the pointers of row r begin at rows[r * row_pointers], none of them is null,
// and its first output is at `column`. Output t of row r goes to to[r], `to_step` columns apart from to_column on.
template <class W, int Rows, int Taps, int S, int R, int T>
inline void dw_tile(const float* const* rows, int64_t row_pointers, int64_t column, const float* weight,
                    int64_t kernel_row, float* const* to, int64_t to_column, int64_t to_step) {
  Vec acc[R][T] = {};
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int word = 0; word < words_of<W>(Taps); ++word) {
      const Vec w = load(weight + i * kernel_row + word * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const float* at = rows[r * row_pointers + i] + (column + word * W::kDepth) * kLanes;
        asm("" : "+r"(at));  // as in dw_columns
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) acc[r][t] = W::multiply_add(w, load(at + t * S * kLanes), acc[r][t]);
      }
    }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) store(to[r] + (to_column + t * to_step) * kLanes, acc[r][t]);
}

// For the rows of small maps, `count` of them, so many outputs each: tiles of as many sums as hide the multiply-adds'
// latency. Arguments as of dw_tile.
template <class W, int Rows, int Taps, int S>
inline void dw_small_rows(const float* const* rows, int64_t row_pointers, int64_t count, int64_t outputs, int64_t column,
                          const float* weight, int64_t kernel_row, float* const* to, int64_t to_column, int64_t to_step) {
  int64_t ow = 0;
  const auto columns = [&]<int R, int T>() {
    int64_t row = 0;
    const auto tile = [&]<int Together>() {
      dw_tile<W, Rows, Taps, S, Together, T>(rows + row * row_pointers, row_pointers, column + ow * S, weight, kernel_row,
                                             to + row, to_column + ow * to_step, to_step);
      row += Together;
    };
    while (count - row >= R) tile.template operator()<R>();
    while (count - row >= 1) tile.template operator()<1>();
    ow += T;
  };
  constexpr int kMany = kLanes == 16 ? 2 : 1;
  while (outputs - ow >= 4) columns.template operator()<2 * kMany, 4>();
  while (outputs - ow >= 2) columns.template operator()<4 * kMany, 2>();
  while (outputs - ow >= 1) columns.template operator()<8, 1>();
}

// Maps so small that whole images are done at once, several of them: row by row, most of the time is set-up and waiting for
// sums (Zen 5, bf16, 128 images, cycles a vector, backward and forward: 4x4 97 and 50 to 81 and 31, 2x2 156 and 98 to 74 and
// 32). Of 7x7 maps the rows are as quick.
constexpr int64_t kSmallPixels = 16;

inline bool is_small(const Shape& s) { return s.pixels() > 0 && s.pixels() <= kSmallPixels; }

// Images whose rows fill the tiles and lie in the first-level cache.
inline int64_t small_images(const Shape& s) { return 64 / s.pixels(); }

// What is done to the input on load: nothing, or SiLU(x * scale + shift).
struct InputAffine {
  const float *scale, *shift;  // null: nothing

  InputAffine(const OptionalTensor& scale_, const OptionalTensor& shift_, int64_t channels)
      : scale(check_floats(scale_, "scale", channels)), shift(check_floats(shift_, "shift", channels)) {
    STD_TORCH_CHECK(!scale == !shift, scale ? "shift" : "scale", ": must be given with ", scale ? "scale" : "shift");
  }
};

// A row of the ring: columns on the left of an image's first, of which the windows read only pad_w; and of all, in floats.
struct RingRow {
  int64_t left, first_read, floats;

  RingRow(int64_t width, const Window& win)
      : left(std::max<int64_t>(win.pad_w, 1)), first_read(left - win.pad_w),
        floats((first_read + std::max((win.out_w - 1) * win.stride + win.kernel, width + win.pad_w)) * kLanes) {}
};

// Reads one row of an image into the ring. ahead: to the elements that are wanted next.
template <class T>
inline void fill_ring_row(const T* row, int64_t width, int64_t ahead, int64_t channels, int64_t first, int64_t count,
                          const InputAffine& affine, float* ring, int64_t vector_stride) {
  using W = Words<T>;
  for (int64_t v = 0; v < count; ++v)
    with_lanes(first + v, channels, [&](auto lanes) {
      const int64_t c = (first + v) * kLanes;
      const T* from = row + c;
      float* to = ring + v * vector_stride;
      const auto value = [&](int64_t i) {
        prefetch(from + i * channels + ahead);
        return load(from + i * channels, lanes);
      };
      if (!affine.scale) return write_columns<W>(to, width, value);
      const Vec scale = load(affine.scale + c, lanes), shift = load(affine.shift + c, lanes);
      write_columns<W>(to, width, [&](int64_t i) { return silu<T>(value(i) * scale + shift); });
    });
}

// `depthwise_forward` of small maps.
template <class T, int K, int S, class OnOutputs>
inline void depthwise_forward_small(const T* x, const Shape& s, const Window& win, const float* weight,
                                    const InputAffine& affine, const DepthwiseTasks& tasks, const OnOutputs& on_outputs) {
  using W = Words<T>;
  constexpr int64_t kernel_row = words_of<W>(K) * kLanes, kLine = 64 / sizeof(T);
  const RingRow ring(s.w, win);
  const int64_t together = small_images(s), outputs = win.out_h * win.out_w;
  tasks.run([&](int64_t group, int64_t first, int64_t count) {
    float* rows = scratch((together * s.h + 1) * ring.floats + together * outputs * kLanes);
    float* zeros = rows + together * s.h * ring.floats;
    float* sums = zeros + ring.floats;
    std::memset(rows, 0, (together * s.h + 1) * ring.floats * sizeof(float));
    std::vector<const float*> under(together * win.out_h * K);
    std::vector<float*> to(together * win.out_h);
    for (int64_t row = 0; row < together * win.out_h; ++row) {
      to[row] = sums + row * win.out_w * kLanes;
      for (int64_t kh = 0; kh < K; ++kh) {
        const int64_t h = row % win.out_h * S - win.pad_h + kh;
        under[row * K + kh] = h < 0 || h >= s.h ? zeros : rows + (row / win.out_h * s.h + h) * ring.floats;
      }
    }
    for (int64_t n = tasks.group_begin(group); n < tasks.group_begin(group + 1); n += together) {
      const int64_t images = std::min(together, tasks.group_begin(group + 1) - n);
      for (int64_t v = first; v < first + count; ++v)
        with_lanes(v, s.c, [&](auto lanes) {
          for (int64_t row = 0; row < images * s.h; ++row)
            fill_ring_row(x + (n * s.h + row) * s.w * s.c, s.w, kLine, s.c, v, 1, affine,
                          rows + row * ring.floats + ring.left * kLanes, 0);
          dw_small_rows<W, K, K, S>(under.data(), K, images * win.out_h, win.out_w, ring.first_read,
                                    weight + v * K * kernel_row, kernel_row, to.data(), 0, 1);
          for (int64_t i = 0; i < images; ++i) {
            auto sink = on_outputs(group, n + i, v * kLanes, lanes, 0, outputs, kLine);
            do
              for (int64_t at = 0; at < outputs; ++at) sink(at, load(sums + (i * outputs + at) * kLanes));
            while (!sink.finish());
          }
        });
    }
  });
}

// Rows of outputs that are asked for ahead of the one that is stored: at least as many as are done together.
constexpr int64_t kRowsAhead = 4;

// Runs the convolution. on_outputs(group, image, first channel, lanes, first, count, elements to those that are wanted next)
// returns the sink for neighbouring outputs of a vector: it is called with (output, sums), and its .finish() is false if it
// must see them again.
template <class T, int K, int S, class OnOutputs>
inline void depthwise_forward(const T* x, const Shape& s, const Window& win, const float* weight,
                              const InputAffine& affine, const DepthwiseTasks& tasks, const OnOutputs& on_outputs) {
  if (is_small(s)) return depthwise_forward_small<T, K, S>(x, s, win, weight, affine, tasks, on_outputs);
  using W = Words<T>;
  constexpr int kRows = K <= 3 ? 4 : 8;
  constexpr int64_t kTogether = (kRows - K) / S + 1;  // output rows that the ring holds all inputs of, as in backward
  constexpr int64_t kernel_row = words_of<W>(K) * kLanes;
  const RingRow of_ring(s.w, win);
  const int64_t vector_floats = kRows * of_ring.floats;
  tasks.run([&](int64_t group, int64_t first, int64_t count) {
    float* ring = scratch(count * vector_floats);
    std::memset(ring, 0, count * vector_floats * sizeof(float));
    for (int64_t n = tasks.group_begin(group); n < tasks.group_begin(group + 1); ++n) {
      const T* image = x + n * s.pixels() * s.c;
      int64_t filled = 0;
      for (int64_t top = 0; top < win.out_h; top += kTogether) {
        const int64_t bottom = std::min(top + kTogether, win.out_h);
        for (; filled < std::min(s.h, (bottom - 1) * S - win.pad_h + K); ++filled)
          fill_ring_row(image + filled * s.w * s.c, s.w, kTogether * S * s.w * s.c, s.c, first, count, affine,
                        ring + filled % kRows * of_ring.floats + of_ring.left * kLanes, vector_floats);
        for (int64_t v = 0; v < count; ++v)
          with_lanes(first + v, s.c, [&](auto lanes) {
            for (int64_t oh = top; oh < bottom; ++oh) {
              const float* rows[K];
              for (int kh = 0; kh < K; ++kh) {
                const int64_t h = oh * S - win.pad_h + kh;
                const float* row = ring + v * vector_floats + h % kRows * of_ring.floats + of_ring.first_read * kLanes;
                rows[kh] = h < 0 || h >= s.h ? nullptr : row;
              }
              auto sink = on_outputs(group, n, (first + v) * kLanes, lanes, oh * win.out_w, win.out_w,
                                     kRowsAhead * win.out_w * s.c);
              do
                dw_row<W, K, K, S>(rows, weight + (first + v) * K * kernel_row, kernel_row, win.out_w, sink);
              while (!sink.finish());
            }
          });
      }
    }
  });
}

inline int64_t forward_bytes_per_vector(const Shape& s, const Window& win) {
  return (win.kernel <= 3 ? 4 : 8) * (s.w + 2 * win.kernel) * kLanes * (int64_t)sizeof(float);
}

// Stores outputs, and sums them and their squares around the mean of a task's first ones, so that a large mean does not
// cancel in the squares. Those are therefore seen twice.
template <class T, class Lanes>
struct StatisticsSink {
  T* out;
  int64_t channels;
  Lanes lanes;
  float* state;  // [center, sum, sum of squares][lane] of this task and vector
  int64_t count, ahead;
  bool first;
  Vec center, sum = {}, square = {};

  void operator()(int64_t at, Vec y) {
    prefetch_to_write(out + at * channels + ahead);
    store(out + at * channels, y, lanes);
    const Vec d = y - center;
    sum += d;
    square += d * d;
  }
  bool finish() {
    if (first) {
      center = sum / (float)count;
      store(state, center);
      first = false;
      sum = square = Vec{};
      return false;
    }
    store(state + kLanes, load(state + kLanes) + sum);
    store(state + 2 * kLanes, load(state + 2 * kLanes) + square);
    return true;
  }
};

// The statistics of all tasks' sinks together: state [task][vector][center, sum, sum of squares][lane], of count(task) values
// a channel.
template <class Count>
inline void combine_statistics(const std::vector<float>& state, int64_t tasks, int64_t channels, const Count& count,
                               float* mean, float* m2) {
  const int64_t vectors = (channels + kLanes - 1) / kLanes;
  std::vector<float> means(tasks * channels), m2s(tasks * channels);
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t c = 0; c < channels; ++c) {
      const float* mine = &state[(task * vectors + c / kLanes) * 3 * kLanes + c % kLanes];
      const float d = mine[kLanes] / (float)count(task);
      means[task * channels + c] = mine[0] + d;
      m2s[task * channels + c] = mine[2 * kLanes] - mine[kLanes] * d;
    }
  combine_moments(means.data(), m2s.data(), tasks, channels, count, mean, m2);
}

std::tuple<Tensor, Tensor, Tensor> dwconv_stats(const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
                                                const OptionalTensor& shift, int64_t stride, bool same) {
  const Shape s = check_nhwc(x, "x");
  const Window win = depthwise_window(s, weight, stride, same);
  const InputAffine affine(scale, shift, s.c);
  const DepthwiseTasks tasks(s, forward_bytes_per_vector(s, win));
  const std::vector<float> packed = pack_depthwise(weight, s, win, x);
  Tensor y = empty_nhwc({s.n, s.c, win.out_h, win.out_w}, x.scalar_type());
  Tensor mean = empty_floats({s.c}), m2 = empty_floats({s.c});
  const int64_t pixels = s.n > 0 ? win.out_h * win.out_w : 0;
  std::vector<float> state(tasks.groups * s.vectors() * 3 * kLanes);
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* out = (T*)y.mutable_data_ptr();
    const auto on_outputs = [&](int64_t group, int64_t n, int64_t c, auto lanes, int64_t begin, int64_t count,
                                int64_t ahead) {
      float* mine = state.data() + (group * s.vectors() + c / kLanes) * 3 * kLanes;
      const bool first = n == tasks.group_begin(group) && begin == 0;
      return StatisticsSink<T, decltype(lanes)>{
          out + (n * pixels + begin) * s.c + c, s.c, lanes, mine, count, ahead, first, load(mine)};
    };
    dispatch_window(win, [&]<int K, int S>() {
      depthwise_forward<T, K, S>((const T*)x.const_data_ptr(), s, win, packed.data(), affine, tasks, on_outputs);
    });
  });
  const auto count = [&](int64_t group) { return tasks.group_images(group) * pixels; };
  combine_statistics(state, pixels > 0 ? tasks.groups : 0, s.c, count, floats(mean), floats(m2));
  return {y, mean, m2};
}

// Stores SiLU(y * scale + shift) and sums it over the image.
template <class T, class Lanes>
struct AffineSink {
  T* out;
  int64_t channels;
  Lanes lanes;
  float* pooled;
  int64_t ahead;
  Vec scale, shift, sum;

  void operator()(int64_t at, Vec y) {
    prefetch_to_write(out + at * channels + ahead);
    const Vec z = silu<T>(y * scale + shift);
    store(out + at * channels, z, lanes);
    sum += z;
  }
  bool finish() {
    store(pooled, sum, lanes);
    return true;
  }
};

std::tuple<Tensor, Tensor> dwconv_affine(const Tensor& x, const Tensor& weight, const OptionalTensor& in_scale,
                                         const OptionalTensor& in_shift, const Tensor& scale, const Tensor& shift,
                                         int64_t stride, bool same) {
  const Shape s = check_nhwc(x, "x");
  const Window win = depthwise_window(s, weight, stride, same);
  const InputAffine affine(in_scale, in_shift, s.c);
  const float *sc = check_floats(scale, "scale", s.c), *sh = check_floats(shift, "shift", s.c);
  const DepthwiseTasks tasks(s, forward_bytes_per_vector(s, win));
  const std::vector<float> packed = pack_depthwise(weight, s, win, x);
  Tensor z = empty_nhwc({s.n, s.c, win.out_h, win.out_w}, x.scalar_type());
  Tensor pooled = torch::stable::new_zeros(scale, {s.n, s.c});
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* out = (T*)z.mutable_data_ptr();
    const auto on_outputs = [&](int64_t, int64_t n, int64_t c, auto lanes, int64_t begin, int64_t, int64_t ahead) {
      float* sum = floats(pooled) + n * s.c + c;
      return AffineSink<T, decltype(lanes)>{out + (n * win.out_h * win.out_w + begin) * s.c + c, s.c, lanes, sum,
                                            ahead, load(sc + c, lanes), load(sh + c, lanes), load(sum, lanes)};
    };
    dispatch_window(win, [&]<int K, int S>() {
      depthwise_forward<T, K, S>((const T*)x.const_data_ptr(), s, win, packed.data(), affine, tasks, on_outputs);
    });
  });
  return {z, pooled};
}

}  // namespace effnet_fast
