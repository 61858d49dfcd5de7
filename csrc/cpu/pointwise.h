// 1x1 convolutions as matrix products over blocks of pixels in cache. What stands before a product (BatchNorm, SiLU, gate)
// is done as its operand is formed, what follows (statistics, sums) on its result before that leaves the cache.
#pragma once

#include <numeric>

#include "matmul.h"
#include "output_grad.h"
#include "window.h"

namespace effnet_fast {

// Pixels that are formed, multiplied and emitted together: many, so that the weight gradient is loaded and stored seldom,
// as long as their formed rows stay in the second-level cache; whole tiles of rows.
template <class W>
inline int64_t block_rows(int64_t channels) {
  return (channels <= 512 ? 132 : 72) / W::kRows * W::kRows;
}

// Rows that are added to a weight gradient at once, in whole blocks. One that does not stay in the first-level cache is
// loaded and stored seldom, as long as its operands stay in the second-level cache (Zen 5, B0's at 224 px: 39.0 to 36.5 ms
// of products in bf16, 83 to 76 in fp32).
template <class W>
inline int64_t weight_grad_rows(int64_t in_channels, int64_t out_channels) {
  const int64_t block = block_rows<W>(out_channels), words = block / W::kDepth * (in_channels + out_channels);
  return in_channels * out_channels <= 8192 ? block : block * std::clamp<int64_t>(163840 / words, 1, 8);
}

// Rows of the matrix of all pixels.
struct Block {
  int64_t chunk, begin, rows;
  bool first, last;  // of its chunk

  // Calls f(image, begin, end) for the rows of each image.
  template <class F>
  void for_each_image(int64_t pixels, const F& f) const {
    int64_t image = begin / pixels;
    for (int64_t row = 0; row < rows; ++image) {
      const int64_t end = std::min(rows, (image + 1) * pixels - begin);
      f(image, row, end);
      row = end;
    }
  }
};

// A task of a product is a chunk of pixels: part of an image, or several whole ones. The cut follows from the shape alone,
// so that sums over chunks do not depend on the number of threads.
struct PixelChunks {
  int64_t images, pixels, per_image, images_each, count;

  explicit PixelChunks(const Shape& s) : images(s.n), pixels(s.pixels()) {
    const int64_t size = std::clamp<int64_t>(images * pixels / 64, 128, 1024);
    per_image = (pixels + size - 1) / size;
    images_each = std::max<int64_t>(size / pixels, 1);
    count = (images * per_image + images_each - 1) / images_each;
  }
  int64_t begin(int64_t chunk) const {
    const int64_t image = std::min(chunk / per_image * images_each, images);
    return image * pixels + pixels * (chunk % per_image) / per_image;
  }
  int64_t size(int64_t chunk) const { return begin(chunk + 1) - begin(chunk); }
  // Where the sums over an image's pixels in a chunk belong, of images * per_image places.
  int64_t place(int64_t image, int64_t chunk) const { return image * per_image + chunk % per_image; }

  template <class W, class F>
  void for_each_block(int64_t chunk, int64_t max_rows, const F& f) const {
    // blocks as even as can be, of whole tiles but for the last
    const int64_t end = begin(chunk + 1), blocks = (size(chunk) + max_rows - 1) / max_rows;
    const int64_t tiles = (size(chunk) + W::kRows - 1) / W::kRows, step = (tiles + blocks - 1) / blocks * W::kRows;
    for (int64_t row = begin(chunk); row < end; row += step) {
      const int64_t rows = std::min(step, end - row);
      f(Block{chunk, row, rows, row == begin(chunk), row + rows == end});
    }
  }
};

inline void check_pointwise(const Tensor& weight, const Shape& s) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == s.c && weight.size(2) == 1 && weight.size(3) == 1,
                  "weight: must be [C_out, ", s.c, ", 1, 1]");
  STD_TORCH_CHECK(weight.size(0) % 8 == 0, "weight: got ", weight.size(0), " output channels, must be a multiple of 8");
}

// What is done to the input of a product on load: SiLU(x * scale + shift), times gate; either may be missing.
struct GatedInput {
  const float *scale, *shift;  // [C]
  const float* gate;           // [N, C]

  GatedInput(const OptionalTensor& scale_, const OptionalTensor& shift_, const OptionalTensor& gate_, const Shape& s)
      : scale(check_floats(scale_, "scale", s.c)), shift(check_floats(shift_, "shift", s.c)),
        gate(check_floats(gate_, "gate", s.c, s.n)) {
    STD_TORCH_CHECK(!scale == !shift, scale ? "shift" : "scale", ": must be given with ", scale ? "scale" : "shift");
  }
};

// The words that end the rows of a product's operand, for `form_rows` and `form_grad_rows`, which leave them as they are.
template <class W>
inline void end_rows(float* rows, int64_t count, int64_t row_words, int64_t channels) {
  const int64_t words = channels / W::kDepth, zeros = product_words<W>(channels) - words;
  for (int64_t r = 0; zeros > 0 && r < count; ++r) std::memset(rows + r * row_words + words, 0, zeros * sizeof(float));
}

// Writes a block of pixels as rows of words.
template <class T>
inline void form_rows(const T* x, const Shape& s, const Block& block, const GatedInput& input, float* rows,
                      int64_t row_words) {
  for (int64_t v = 0; v < s.vectors(); ++v)
    with_lanes(v, s.c, [&](auto lanes) {
      const int64_t c = v * kLanes;
      const T* from = x + block.begin * s.c + c;
      const Vec scale = input.scale ? load(input.scale + c, lanes) : Vec{};
      const Vec shift = input.scale ? load(input.shift + c, lanes) : Vec{};
      block.for_each_image(s.pixels(), [&](int64_t image, int64_t begin, int64_t end) {
        const Vec gate = input.gate ? load(input.gate + image * s.c + c, lanes) : broadcast(1.f);
        if (!input.scale) {
          for (int64_t r = begin; r < end; ++r) {
            prefetch_to_second_level(from + (r + block.rows) * s.c);
            ProductWords<T>::store_row(rows + r * row_words, c, load(from + r * s.c, lanes) * gate);
          }
          return;
        }
        for (int64_t r = begin; r < end; ++r) {
          prefetch_to_second_level(from + (r + block.rows) * s.c);
          ProductWords<T>::store_row(rows + r * row_words, c, silu<T>(load(from + r * s.c, lanes) * scale + shift) * gate);
        }
      });
    });
}

// The product of all pixels with packed weights. emit(block, vector, sums, stride, state) takes a block's results for a
// vector of output channels, `stride` floats apart, and 3 * kLanes floats of its own that live as long as the chunk.
template <class T, class Emit>
inline void multiply_pixels(const T* x, const Shape& s, const GatedInput& input, const Tensor& panels, int64_t columns,
                            const PixelChunks& chunks, const Emit& emit) {
  using W = ProductWords<T>;
  constexpr int64_t kMinTasks = 8;
  const int64_t words = product_words<W>(s.c), row_words = padded_row(s.c), vectors = (columns + kLanes - 1) / kLanes;
  const int64_t max_rows = block_rows<W>(s.c);
  const int64_t count = (vectors + kPanelVectors - 1) / kPanelVectors;
  // too few pixels to go round (a batch of one): the output channels are split as well, for which each part forms its rows
  const int64_t threads = chunks.count < kMinTasks ? torch::stable::get_num_threads() : 1;
  const int64_t groups = std::min(threads / std::gcd(threads, chunks.count), count);
  for_each_task(chunks.count * groups, [&](int64_t task) {
    const int64_t group = task % groups;
    float* rows = scratch(max_rows * (row_words + kPanelColumns) + vectors * 3 * kLanes);
    float* sums = rows + max_rows * row_words;
    float* state = sums + max_rows * kPanelColumns;
    end_rows<W>(rows, max_rows, row_words, s.c);
    [[maybe_unused]] const ProductRegisters<W> registers;
    chunks.for_each_block<W>(task / groups, max_rows, [&](const Block& block) {
      form_rows(x, s, block, input, rows, row_words);
      for_each_panel(count * group / groups, count * (group + 1) / groups, vectors, [&]<int V>(int64_t panel) {
        multiply_panel<W, V>(block.rows, words, rows, row_words, 1, floats(panels) + panel * kPanelColumns * words,
                             V * kLanes, sums, V * kLanes, false);
        for (int v = 0; v < V; ++v) {
          const int64_t vector = panel * kPanelVectors + v;
          emit(block, vector, sums + v * kLanes, V * kLanes, state + vector * 3 * kLanes);
        }
      });
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> pointwise_stats(const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
                                                   const OptionalTensor& shift, const OptionalTensor& gate) {
  const Shape s = check_nhwc(x, "x");
  check_pointwise(weight, s);
  const GatedInput input(scale, shift, gate, s);
  const int64_t channels = weight.size(0);
  const FloatWeights w = as_floats(weight, "weight");
  const PixelChunks chunks(s);
  Tensor y = empty_nhwc({s.n, channels, s.h, s.w}, x.scalar_type());
  Tensor mean = empty_floats({channels}), m2 = empty_floats({channels});
  std::vector<double> means(chunks.count * channels);
  std::vector<float> m2s(chunks.count * channels);
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* out = (T*)y.mutable_data_ptr();
    const Tensor panels = pack_panels<ProductWords<T>>(w.data, s.c, channels, 1, s.c);
    const auto emit = [&](const Block& block, int64_t vector, const float* from, int64_t stride, float* state) {
      with_lanes(vector, channels, [&](auto lanes) {
        const int64_t c = vector * kLanes;
        T* to = out + block.begin * channels + c;
        // around the mean of the chunk's first block, so that a large mean does not cancel in the squares
        Vec center = load(state), sum = load(state + kLanes), square = load(state + 2 * kLanes);
        if (block.first) {
          sum = square = Vec{};
          for (int64_t r = 0; r < block.rows; ++r) sum += load(from + r * stride);
          center = sum / (float)block.rows;
          sum = Vec{};
        }
        Vec odd_sum = {}, odd_square = {};  // half as long a chain of additions
        const auto add = [&](int64_t r, Vec& sum, Vec& square) {
          const Vec value = load(from + r * stride), d = value - center;
          prefetch_to_write(to + (r + block.rows) * channels);
          store(to + r * channels, value, lanes);
          sum += d;
          square += d * d;
        };
        int64_t r = 0;
        for (; r + 1 < block.rows; r += 2) {
          add(r, sum, square);
          add(r + 1, odd_sum, odd_square);
        }
        if (r < block.rows) add(r, sum, square);
        sum += odd_sum;
        square += odd_square;
        store(state, center);
        store(state + kLanes, sum);
        store(state + 2 * kLanes, square);
        if (block.last)
          for (int lane = 0; lane < lanes; ++lane) {
            const double d = (double)sum[lane] / (double)chunks.size(block.chunk);
            means[block.chunk * channels + c + lane] = center[lane] + d;
            m2s[block.chunk * channels + c + lane] = (float)(square[lane] - sum[lane] * d);
          }
      });
    };
    multiply_pixels((const T*)x.const_data_ptr(), s, input, panels, channels, chunks, emit);
  });
  combine_moments(means.data(), m2s.data(), chunks.count, channels, [&](int64_t chunk) { return chunks.size(chunk); },
                  floats(mean), floats(m2));
  return {y, mean, m2};
}

// Stores to z u or SiLU(u), u = product * scale + shift (scale null: product + shift), plus residual.
inline void affine_product(const Tensor& x, const Shape& s, const Tensor& panels, const GatedInput& input,
                           const float* scale, const float* shift, bool silu_, const OptionalTensor& residual,
                           const Tensor& z) {
  const int64_t channels = z.size(1);
  if (residual) check_like(*residual, "residual", z, "the output");
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* out = (T*)z.mutable_data_ptr();
    const T* res = residual ? (const T*)residual->const_data_ptr() : nullptr;
    const auto emit = [&](const Block& block, int64_t vector, const float* from, int64_t stride, float*) {
      with_lanes(vector, channels, [&](auto lanes) {
        const int64_t c = vector * kLanes, first = block.begin * channels + c;
        const Vec factor = scale ? load(scale + c, lanes) : broadcast(1.f), offset = load(shift + c, lanes);
        for (int64_t r = 0; r < block.rows; ++r) {
          const int64_t at = first + r * channels;
          Vec value = load(from + r * stride) * factor + offset;
          prefetch_to_write(out + at + block.rows * channels);
          if (silu_) value = silu<T>(value);
          if (res) {
            prefetch_to_second_level(res + at + block.rows * channels);
            value += load(res + at, lanes);
          }
          store(out + at, value, lanes);
        }
      });
    };
    multiply_pixels((const T*)x.const_data_ptr(), s, input, panels, channels, PixelChunks(s), emit);
  });
}

// The weight as a product with tensors of like's dtype reads it.
Tensor pack_pointwise(const Tensor& weight, const Tensor& like) {
  STD_TORCH_CHECK(weight.dim() == 4, "weight: must be [C_out, C_in, 1, 1]");
  const Shape s{0, weight.size(1), 1, 1};
  STD_TORCH_CHECK(s.c % 8 == 0, "weight: takes ", s.c, " channels, must be a multiple of 8");
  check_pointwise(weight, s);
  const FloatWeights w = as_floats(weight, "weight");
  Tensor panels = empty_floats({0});
  dispatch(like, "like", [&](auto* type) {
    panels = pack_panels<ProductWords<std::remove_pointer_t<decltype(type)>>>(w.data, s.c, weight.size(0), 1, s.c);
  });
  return panels;
}

inline void check_panels(const Tensor& panels, const Tensor& x, int64_t channels) {
  const Shape s = check_nhwc(x, "x");
  int64_t words = 0;
  dispatch(x, "x", [&](auto* type) { words = product_words<ProductWords<std::remove_pointer_t<decltype(type)>>>(s.c); });
  const int64_t padded = (channels + kLanes - 1) / kLanes * kLanes;
  check_on_cpu(panels, "panels");
  STD_TORCH_CHECK(panels.scalar_type() == ScalarType::Float && panels.numel() == words * padded,
                  "panels: must be of a weight from ", s.c, " to ", channels, " channels, packed for the dtype of x");
}

// pointwise_affine with packed weights and scale 1, stored to z.
inline void packed_pointwise(const Tensor& x, const Tensor& panels, const OptionalTensor& gate, const Tensor& shift,
                             bool silu_, const OptionalTensor& residual, const Tensor& z) {
  const Shape s = check_nhwc(x, "x");
  check_panels(panels, x, shift.numel());
  affine_product(x, s, panels, GatedInput(std::nullopt, std::nullopt, gate, s), nullptr,
                 check_floats(shift, "shift", shift.numel()), silu_, residual, z);
}

Tensor pointwise_affine(const Tensor& x, const Tensor& weight, const OptionalTensor& gate, const Tensor& scale,
                        const Tensor& shift, bool silu_, const OptionalTensor& residual) {
  const Shape s = check_nhwc(x, "x");
  check_pointwise(weight, s);
  const int64_t channels = weight.size(0);
  const Tensor z = empty_nhwc({s.n, channels, s.h, s.w}, x.scalar_type());
  affine_product(x, s, pack_pointwise(weight, x), GatedInput(std::nullopt, std::nullopt, gate, s),
                 check_floats(scale, "scale", channels), check_floats(shift, "shift", channels), silu_, residual, z);
  return z;
}

// The BatchNorm + SiLU and the gate between a product's input x and the product; scale is null if there are none.
struct InputActivation {
  const float *scale, *shift, *mean, *rstd;  // [C]
  const float* gate;                         // [N, C] or null
};

// Writes value(r) for the rows [begin, end) of `rows`, as words that pair neighbouring rows, `stride` apart. `before`:
// hands the value of a row whose partner is another image's to the next call.
template <class W, class Value>
inline void write_pairs(float* to, int64_t stride, int64_t begin, int64_t end, int64_t rows, Vec& before,
                        const Value& value) {
  int64_t r = begin;
  if constexpr (W::kDepth == 1) {
    for (; r < end; ++r) store(to + r * stride, value(r));
  } else {
    if (r % 2 == 1 && r < end) store(to + r / 2 * stride, W::pair(before, value(r))), ++r;
    for (; r + 1 < end; r += 2) {
      const Vec first = value(r);
      store(to + r / 2 * stride, W::pair(first, value(r + 1)));
    }
    if (r < end) {
      before = value(r);
      if (r == rows - 1) store(to + r / 2 * stride, W::pair(before, Vec{}));
    }
  }
}

// Writes the output's gradient for a block of pixels as rows of words, and again with words that pair neighbouring rows
// (the same memory where a word is one float).
template <class T>
inline void form_grad_rows(const T* grad, const T* y, const Shape& s, const Block& block, const OutputGrad& op,
                           float* rows, float* row_pairs, int64_t row_words) {
  using W = ProductWords<T>;
  for (int64_t v = 0; v < s.vectors(); ++v)
    with_lanes(v, s.c, [&](auto lanes) {
      const int64_t c = v * kLanes, first = block.begin * s.c + c;
      Vec before = {};
      block.for_each_image(s.pixels(), [&](int64_t image, int64_t begin, int64_t end) {
        const auto write = [&](const auto& value) {
          const auto row = [&](int64_t r) {
            const Vec d = value(first + r * s.c);
            W::store_row(rows + r * row_words, c, d);
            return d;
          };
          if constexpr (W::kDepth == 1)
            for (int64_t r = begin; r < end; ++r) row(r);
          else
            write_pairs<W>(row_pairs + c, row_words, begin, end, block.rows, before, row);
        };
        const int64_t ahead = block.rows * s.c;
        if (!op.scale)
          return write([&](int64_t at) {
            prefetch_to_second_level(grad + at + ahead);
            return load(grad + at, lanes);
          });
        write([&, dy = op.of<T>(image, s.c, c, lanes)](int64_t at) {
          prefetch_to_second_level(grad + at + ahead);
          prefetch_to_second_level(y + at + ahead);
          return dy(load(grad + at, lanes), load(y + at, lanes));
        });
      });
    });
}

// What the input's side of a product does with a block's result for the channels from c on: stores the input's gradient
// (plus residual), sums what the input's BatchNorm and gate need, and writes the activated input as words that pair rows.
template <class T, class Lanes>
inline void emit_input_grad(const float* from, int64_t stride, const T* x, const T* residual, const Shape& s,
                            const PixelChunks& chunks, const Block& block, int64_t c, Lanes lanes,
                            const InputActivation& op, T* dx, float* sums, float* activated) {
  using W = ProductWords<T>;
  const int64_t first = block.begin * s.c + c, ahead = block.rows * s.c;
  Vec before = {};
  const auto each = [&](int64_t begin, int64_t end, const auto& row) {
    write_pairs<W>(activated, stride, begin, end, block.rows, before,
                   [&](int64_t r) { return row(first + r * s.c, load(from + r * stride)); });
  };
  if (!op.scale)
    return each(0, block.rows, [&](int64_t at, Vec grad) {
      prefetch_to_write(dx + at + ahead);
      prefetch_to_second_level(x + at + ahead);
      if (residual) {
        prefetch_to_second_level(residual + at + ahead);
        grad += load(residual + at, lanes);
      }
      store(dx + at, grad, lanes);
      return load(x + at, lanes);
    });
  const Vec scale = load(op.scale + c, lanes), shift = load(op.shift + c, lanes);
  const Vec mean = load(op.mean + c, lanes), rstd = load(op.rstd + c, lanes);
  block.for_each_image(s.pixels(), [&](int64_t image, int64_t begin, int64_t end) {
    const Vec gate = op.gate ? load(op.gate + image * s.c + c, lanes) : broadcast(1.f);
    float* image_sums = sums + chunks.place(image, block.chunk) * s.c + c;
    const int64_t plane = chunks.images * chunks.per_image * s.c;
    Vec sum[5] = {};
    each(begin, end, [&](int64_t at, Vec grad) {
      prefetch_to_write(dx + at + ahead);
      prefetch_to_second_level(x + at + ahead);
      store(dx + at, grad, lanes);
      grad = rounded<T>(grad);
      const Vec value = load(x + at, lanes), u = value * scale + shift, centered = value - mean;
      const Vec sig = sigmoid<T>(u), z = u * sig, slope = silu_slope(sig, z), du = grad * slope;
      sum[0] += grad * z;
      sum[1] += du;
      sum[2] += slope;
      sum[3] += du * centered;
      sum[4] += slope * centered;
      return z * gate;
    });
    for (int i = 3; i < 5; ++i) sum[i] *= rstd;
    for (int i = 0; i < 5; ++i) store(image_sums + i * plane, load(image_sums + i * plane, lanes) + sum[i], lanes);
  });
}

// Writes a block's input for the channels from c on as words that pair rows.
template <class T, class Lanes>
inline void write_input(const T* x, const Shape& s, const Block& block, int64_t c, Lanes lanes, float* to,
                        int64_t stride) {
  Vec before = {};
  write_pairs<ProductWords<T>>(to, stride, 0, block.rows, block.rows, before, [&](int64_t r) {
    const T* from = x + (block.begin + r) * s.c + c;
    prefetch_to_second_level(from + block.rows * s.c);
    return load(from, lanes);
  });
}

// The two products of a backward pass: the gradients `dy` [rows, out] of a block of pixels with the weight, and, summed over
// many blocks, with the input. For one thread, in so many floats of memory.
template <class T>
class GradProducts {
  using W = ProductWords<T>;
  int64_t in, out, max_rows, words, row_words, room, transposed_row;
  float *rows, *first_pairs, *products, *all_activated, *transposed;
  const float* panels;
  float* weight_grad;
  int64_t pairs = 0;  // of rows, formed and not yet added
  bool add_to_weight = false;
  [[no_unique_address]] ProductRegisters<W> registers;

  // else a block's rows are those of the weight gradient
  static int64_t own_rows(int64_t max_rows) { return W::kDepth > 1 ? max_rows : 0; }
  static int64_t pairs_room(int64_t in, int64_t out, int64_t max_rows) {
    return product_words<W>(std::max(weight_grad_rows<W>(in, out), max_rows));
  }

 public:
  static int64_t grad_row(int64_t in) { return (in + kLanes - 1) / kLanes * kLanes; }
  static int64_t weight_grad_floats(int64_t in, int64_t out) { return whole_tiles<W>(out) * grad_row(in); }
  static int64_t floats(int64_t in, int64_t out, int64_t max_rows) {
    const int64_t room = pairs_room(in, out, max_rows);
    return (own_rows(max_rows) + room) * padded_row(out) + whole_tiles<W>(max_rows) * kPanelColumns + room * grad_row(in) +
           (W::kTiles ? whole_tiles<W>(out) * padded_row(room) : 0);
  }

  // panels: the packed weight, or null. weight_grad: [out, grad_row], whole tiles.
  GradProducts(int64_t in, int64_t out, int64_t max_rows, float* memory, const float* panels, float* weight_grad)
      : in(in), out(out), max_rows(max_rows), words(product_words<W>(out)), row_words(padded_row(out)),
        room(pairs_room(in, out, max_rows)), transposed_row(padded_row(room)), rows(memory),
        first_pairs(rows + own_rows(max_rows) * row_words), products(first_pairs + room * row_words),
        all_activated(products + whole_tiles<W>(max_rows) * kPanelColumns), transposed(all_activated + room * grad_row(in)),
        panels(panels), weight_grad(weight_grad) {
    end_rows<W>(rows, own_rows(max_rows), row_words, out);
  }

  // form(rows, row_pairs, row_words) writes a block's dy as `form_grad_rows` does. emit(products, stride, first channel,
  // lanes, activated) takes the products with the weight, for a vector of the input's channels, and writes the input as
  // `write_input` does. Panels of input channels [begin, end); last: of the blocks that are added up.
  template <class Form, class Emit>
  void add(int64_t count, bool last, int64_t begin, int64_t end, const Form& form, const Emit& emit) {
    float* row_pairs = first_pairs + pairs * row_words;
    float* block_rows = W::kDepth > 1 ? rows : row_pairs;
    form(block_rows, row_pairs, row_words);
    const int64_t before = pairs;
    pairs += words_of<W>(count);
    const bool full = last || pairs + words_of<W>(max_rows) > room;
    const int64_t summed = product_words<W>(pairs * W::kDepth);
    LeftOperand grads{};
    if (full) grads = columns_as_rows<W>(first_pairs, row_words, pairs, out, transposed, transposed_row);
    for_each_panel(begin, end, (in + kLanes - 1) / kLanes, [&]<int V>(int64_t panel) {
      float* panel_activated = all_activated + panel * kPanelColumns * room;
      float* activated = panel_activated + before * V * kLanes;
      if (panels)
        multiply_panel<W, V>(count, words, block_rows, row_words, 1, panels + panel * kPanelColumns * words, V * kLanes,
                             products, V * kLanes, false);
      for (int v = 0; v < V; ++v)
        with_lanes(panel * kPanelVectors + v, in, [&](auto lanes) {
          emit(products + v * kLanes, V * kLanes, (panel * kPanelVectors + v) * kLanes, lanes, activated + v * kLanes);
        });
      if (!full) return;
      std::memset(panel_activated + pairs * V * kLanes, 0, (summed - pairs) * V * kLanes * sizeof(float));
      multiply_panel<W, V>(out, summed, grads.words, grads.row, grads.step, panel_activated, V * kLanes,
                           weight_grad + panel * kPanelColumns, grad_row(in), add_to_weight);
    });
    if (full) {
      pairs = 0;
      add_to_weight = true;
    }
  }
};

// to [out, in] = the sum of the parts [part, `GradProducts::weight_grad_floats`].
inline void sum_weight_grads(const Tensor& parts, int64_t in, const Tensor& to) {
  const int64_t row_floats = GradProducts<float>::grad_row(in), part_floats = parts.size(1);
  const float* from = (const float*)parts.const_data_ptr();
  float* out = floats(to);
  torch::stable::parallel_for(0, to.size(0), 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t v = 0; v * kLanes < in; ++v)
        with_lanes(v, in, [&](auto lanes) {
          Vec sum = {};
          for (int64_t part = 0; part < parts.size(0); ++part)
            sum += load(from + part * part_floats + row * row_floats + v * kLanes);
          store(out + row * in + v * kLanes, sum, lanes);
        });
  });
}

std::tuple<Tensor, Tensor, Tensor> backward_pointwise(
    const Tensor& grad, const OptionalTensor& y, const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
    const OptionalTensor& shift, const OptionalTensor& mean, bool silu_, const OptionalTensor& gate,
    const OptionalTensor& a, const OptionalTensor& b, const OptionalTensor& in_scale, const OptionalTensor& in_shift,
    const OptionalTensor& in_mean, const OptionalTensor& in_rstd, const OptionalTensor& in_gate,
    const OptionalTensor& residual, bool input_grad) {
  const Shape s = check_nhwc(x, "x"), out = check_nhwc(grad, "grad");
  check_pointwise(weight, s);
  STD_TORCH_CHECK(out.n == s.n && out.c == weight.size(0) && out.h == s.h && out.w == s.w,
                  "grad: must have the shape of the convolution's output");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad: must have the dtype of x");
  if (y) check_like(*y, "y", grad, "grad");
  if (residual) check_like(*residual, "residual", x, "x");
  const OutputGrad output_grad(scale, shift, mean, gate, std::nullopt, a, b, silu_, y.has_value(), out);
  const InputActivation activation{check_floats(in_scale, "in_scale", s.c), check_floats(in_shift, "in_shift", s.c),
                                   check_floats(in_mean, "in_mean", s.c), check_floats(in_rstd, "in_rstd", s.c),
                                   check_floats(in_gate, "in_gate", s.c, s.n)};
  STD_TORCH_CHECK(!activation.scale || (activation.shift && activation.mean && activation.rstd && !residual),
                  "in_scale: needs in_shift, in_mean and in_rstd as well, and no residual");
  STD_TORCH_CHECK(input_grad || !(activation.scale || residual), "input_grad: must be true with in_scale or residual");
  const FloatWeights w = as_floats(weight, "weight");
  const PixelChunks chunks(s);
  // Threads share the pixels, each with a weight gradient of its own, summed up in the end; fewer pixels by panels of input
  // channels, for which each forms the output's gradient anew (Zen 5, the study's variants at 32 px: a step takes 3 % less).
  constexpr int64_t kSharedPixels = 1024;
  const int64_t threads = torch::stable::get_num_threads(), count = (s.vectors() + kPanelVectors - 1) / kPanelVectors;
  const int64_t groups =
      std::clamp<int64_t>(std::min(threads, s.n * s.pixels() / kSharedPixels), 1, std::max<int64_t>(chunks.count, 1));
  const int64_t splits = std::clamp<int64_t>(threads / groups, 1, count);
  Tensor dx = empty_nhwc(input_grad ? s : Shape{0, s.c, s.h, s.w}, x.scalar_type());
  Tensor dweight = empty_floats({out.c, s.c, 1, 1});
  const int64_t grad_size = GradProducts<BFloat16>::weight_grad_floats(s.c, out.c);
  Tensor partial = empty_floats({groups, grad_size});
  if (chunks.count == 0) std::memset(floats(partial), 0, partial.numel() * sizeof(float));
  const int64_t channels = activation.scale ? s.c : 0;
  const int64_t places = s.n * chunks.per_image;
  Tensor image_sums = torch::stable::new_zeros(dweight, {channels ? 5 : 0, places, channels});
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using W = ProductWords<T>;
    const int64_t max_rows = block_rows<W>(out.c);
    const Tensor panels = pack_panels<W>(w.data, out.c, input_grad ? s.c : 0, s.c, 1);
    const T *in = (const T*)x.const_data_ptr(), *dy = (const T*)grad.const_data_ptr();
    const T* source = y ? (const T*)y->const_data_ptr() : nullptr;
    const T* added = residual ? (const T*)residual->const_data_ptr() : nullptr;
    T* to = (T*)dx.mutable_data_ptr();
    for_each_task(groups * splits, [&](int64_t task) {
      const int64_t group = task / splits, split = task % splits;
      GradProducts<T> products(s.c, out.c, max_rows, scratch(GradProducts<T>::floats(s.c, out.c, max_rows)),
                               input_grad ? floats(panels) : nullptr, floats(partial) + group * grad_size);
      const int64_t first_chunk = chunks.count * group / groups, last_chunk = chunks.count * (group + 1) / groups - 1;
      for (int64_t chunk = first_chunk; chunk <= last_chunk; ++chunk)
        chunks.for_each_block<W>(chunk, max_rows, [&](const Block& block) {
          const auto form = [&](float* rows, float* row_pairs, int64_t row_words) {
            form_grad_rows(dy, source, out, block, output_grad, rows, row_pairs, row_words);
          };
          products.add(block.rows, chunk == last_chunk && block.last, count * split / splits, count * (split + 1) / splits,
                       form, [&](const float* from, int64_t stride, int64_t c, auto lanes, float* activated) {
            if (input_grad)
              emit_input_grad(from, stride, in, added, s, chunks, block, c, lanes, activation, to, floats(image_sums),
                              activated);
            else
              write_input(in, s, block, c, lanes, activated, stride);
          });
        });
    });
  });
  sum_weight_grads(partial, s.c, dweight);
  if (chunks.per_image == 1) return {dx, dweight, image_sums};
  Tensor sums = torch::stable::new_zeros(dweight, {channels ? 5 : 0, s.n, channels});
  const float* from = floats(image_sums);
  float* to = floats(sums);
  torch::stable::parallel_for(0, sums.size(0) * s.n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t place = row * chunks.per_image; place < (row + 1) * chunks.per_image; ++place)
        for (int64_t c = 0; c < channels; ++c) to[row * channels + c] += from[place * channels + c];
  });
  return {dx, dweight, sums};
}

// The pixels under a k x k convolution's window, a row (kh, kw, channel) for each output pixel, followed by zeros up to a
// multiple of 8: with it a convolution of few channels is a 1x1 convolution.
Tensor patches(const Tensor& x, int64_t kernel, int64_t stride, bool same) {
  const Shape s = check_nhwc(x, "x", 1);
  const Window win = make_window(s.h, s.w, kernel, stride, same);
  const int64_t depth = (kernel * kernel * s.c + 7) / 8 * 8;
  Tensor out = empty_nhwc({s.n, depth, win.out_h, win.out_w}, x.scalar_type());
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = (const T*)x.const_data_ptr();
    T* rows = (T*)out.mutable_data_ptr();
    for_each_task(s.n * win.out_h, [&](int64_t task) {
      const int64_t n = task / win.out_h, top = task % win.out_h * stride - win.pad_h;
      T* row = rows + task * win.out_w * depth;
      std::memset((void*)row, 0, win.out_w * depth * sizeof(T));
      for (int64_t ow = 0; ow < win.out_w; ++ow, row += depth) {
        const int64_t left = ow * stride - win.pad_w;
        const int64_t begin = std::max<int64_t>(left, 0), end = std::min(left + kernel, s.w);
        for (int64_t kh = std::max<int64_t>(-top, 0); kh < std::min(kernel, s.h - top); ++kh) {
          T* to = row + (kh * kernel + begin - left) * s.c;
          const T* under = from + ((n * s.h + top + kh) * s.w + begin) * s.c;
          const int64_t count = (end - begin) * s.c;
          if (count == 9)  // 3 x 3 of RGB: without a call of memcpy 0.70 ms for 0.88 (Zen 5, 16 images of 224 px, bf16)
            std::memcpy((void*)to, under, 9 * sizeof(T));
          else
            std::memcpy((void*)to, under, count * sizeof(T));
        }
      }
    });
  });
  return out;
}

// u or SiLU(u) of a convolution with packed weights, u = convolution + shift.
Tensor packed_convolution(const Tensor& x, const Tensor& panels, int64_t kernel, int64_t stride, bool same,
                          const Tensor& shift, bool silu_) {
  const Tensor source = kernel == 1 ? x : patches(x, kernel, stride, same);
  Tensor z = empty_nhwc({x.size(0), shift.numel(), source.size(2), source.size(3)}, x.scalar_type());
  packed_pointwise(source, panels, std::nullopt, shift, silu_, std::nullopt, z);
  return z;
}

}  // namespace effnet_fast
