// Squeeze-excite's two-layer MLP and its gradient, on [N, C]: products too small for a library's to be quick.
#pragma once

#include "matmul.h"

namespace effnet_fast {

// The least work, in multiply-adds, that is worth handing to another thread: some microseconds. An element that is copied
// takes as long as kCopyWork of them (counted as one, a step at 32 px took 4 % longer: one thread copied).
constexpr int64_t kMinProductWork = 1 << 19, kCopyWork = 16;

// f(begin, end) over [0, count), of which each costs so many multiply-adds.
template <class F>
inline void for_each_range(int64_t count, int64_t work, const F& f) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kMinProductWork / std::max<int64_t>(work, 1)), f);
}

inline float sum_of_lanes(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);  // with the loop below, the sums took longer than the products
#else
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += v[lane];
  return sum;
#endif
}

// So many floats, at most a vector, and zeros.
inline Vec load_first(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
  float lanes[kLanes] = {};
  std::copy_n(p, std::max<int64_t>(count, 0), lanes);
  return load(lanes);
}

// A product's operand as words (see matmul.h): memory of its own, or where a word is a float, the floats that there are.
struct Operand {
  std::unique_ptr<float[]> memory;
  const float* words;
};

// Words between rows of `row_words`: of so many elements, up to half a vector.
template <class W>
constexpr int64_t words_of_row(int64_t depth) {
  return W::kDepth == 1 ? depth : (depth + 2 * kLanes - 1) / (2 * kLanes) * kLanes;
}

// from [rows, depth] as words along the rows, which end with zeros.
template <class W>
inline Operand row_words(const float* from, int64_t rows, int64_t depth) {
  if constexpr (W::kDepth == 1) return {nullptr, from};
  const int64_t stride = words_of_row<W>(depth);
  std::unique_ptr<float[]> to(new float[whole_tiles<W>(rows) * stride]);
  for_each_range(rows, kCopyWork * depth, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t k = 0; k < stride * W::kDepth; k += kLanes)
        W::store_row(to.get() + row * stride, k, load_first(from + row * depth + k, depth - k));
  });
  const float* words = to.get();
  return {std::move(to), words};
}

// from [depth, channels] as words that pair its rows.
template <class W>
inline Operand paired_rows(const float* from, int64_t depth, int64_t channels) {
  if constexpr (W::kDepth == 1) return {nullptr, from};
  const int64_t pairs = words_of<W>(depth), rows = whole_tiles<W>(pairs);
  std::unique_ptr<float[]> to(new float[rows * channels + kLanes]);  // the last vector of channels may be half full
  std::memset(to.get() + pairs * channels, 0, ((rows - pairs) * channels + kLanes) * sizeof(float));
  for_each_range(pairs, kCopyWork * 2 * channels, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair)
      for (int64_t v = 0; v * kLanes < channels; ++v)
        with_lanes(v, channels, [&](auto lanes) {
          const float* first = from + 2 * pair * channels + v * kLanes;
          const Vec second = 2 * pair + 1 < depth ? load(first + channels, lanes) : Vec{};
          store(to.get() + pair * channels + v * kLanes, W::pair(load(first, lanes), second), lanes);
        });
  });
  const float* words = to.get();
  return {std::move(to), words};
}

// from [columns, depth] as words along the depth, a column of them behind the other: [word][column], which ends with zeros.
template <class W>
inline Operand column_words(const float* from, int64_t columns, int64_t depth) {
  const Operand rows = row_words<W>(from, columns, depth);
  const int64_t words = words_of_row<W>(depth), stride = whole_tiles<W>(columns);
  std::unique_ptr<float[]> to(new float[words * stride]);
  for_each_range(words / kLanes, kCopyWork * kLanes * columns, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kLanes, count = (end - begin) * kLanes;
    columns_as_rows<W>(rows.words + first, words, columns, count, to.get() + first * stride, stride);
  });
  const float* column = to.get();
  return {std::move(to), column};
}

// done(row, first column, sums) for the products of rows of words with a matrix [word][column], both whole tiles.
template <class W, class Done>
inline void tile_product(const float* left, int64_t left_row, int64_t rows, int64_t words, const float* right,
                         int64_t right_row, int64_t columns, const Done& done) {
  constexpr int64_t kSpeed = 8;  // multiply-adds in the time of one in a vector
  const int64_t vectors = (columns + kLanes - 1) / kLanes;
  for_each_range((vectors + kPanelVectors - 1) / kPanelVectors, rows * words * kPanelColumns * W::kDepth / kSpeed,
                 [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const ProductRegisters<W> registers;
    float* sums = scratch(whole_tiles<W>(rows) * kPanelColumns);
    for_each_panel(begin, end, vectors, [&]<int V>(int64_t panel) {
      multiply_panel<W, V>(rows, words, left, left_row, 1, right + panel * kPanelColumns, right_row, sums, V * kLanes,
                           false);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t v = 0; v < V; ++v)
          done(row, (panel * kPanelVectors + v) * kLanes, load(sums + (row * V + v) * kLanes));
    });
  });
}

// out[i][j] = bias[j] + the sum over k of a[i][k] * b[j][k] for i < Rows and j < Columns; words in whole vectors, the last
// perhaps half. bias may be null.
template <class W, int Rows, int Columns>
inline void dot_tile(const float* a, const float* b, int64_t words, const float* bias, float* out, int64_t out_stride) {
  Vec acc[Rows][Columns] = {};
  for (int64_t v = 0; v * kLanes < words; ++v)
    with_lanes(v, words, [&](auto lanes) {
      Vec row[Rows];
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) row[i] = load(a + i * words + v * kLanes, lanes);
#pragma GCC unroll 8
      for (int j = 0; j < Columns; ++j) {
        const Vec column = load(b + j * words + v * kLanes, lanes);
#pragma GCC unroll 8
        for (int i = 0; i < Rows; ++i) acc[i][j] = W::multiply_add(row[i], column, acc[i][j]);
      }
    });
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Columns; ++j) out[i * out_stride + j] = sum_of_lanes(acc[i][j]) + (bias ? bias[j] : 0.f);
}

// out [rows, columns] = a [rows, depth] times the transpose of b [columns, depth], plus bias; depth a multiple of 8.
template <class W>
inline void product_transposed(const float* a, const float* b, int64_t rows, int64_t columns, int64_t depth,
                               const float* bias, float* out) {
  const int64_t words = words_of_row<W>(depth);
  const Operand left = row_words<W>(a, rows, depth);
  if constexpr (W::kTiles) {
    const Operand right = column_words<W>(b, columns, depth);
    return tile_product<W>(left.words, words, rows, words, right.words, whole_tiles<W>(columns), columns,
                           [=](int64_t row, int64_t j, Vec sum) {
      if (bias) sum += load_first(bias + j, columns - j);
      std::memcpy(out + row * columns + j, &sum, std::min<int64_t>(kLanes, columns - j) * sizeof(float));
    });
  }
  const Operand right = row_words<W>(b, columns, depth);
  for_each_range(columns, rows * words, [&](int64_t begin, int64_t end) {
    const auto strip = [&]<int Columns>(int64_t j) {
      const auto tile = [&]<int Rows>(int64_t i) {
        dot_tile<W, Rows, Columns>(left.words + i * words, right.words + j * words, words, bias ? bias + j : nullptr,
                                   out + i * columns + j, columns);
      };
      int64_t i = 0;
      for (; i + 4 <= rows; i += 4) tile.template operator()<4>(i);
      for (; i < rows; ++i) tile.template operator()<1>(i);
    };
    int64_t j = begin;
    for (; j + 4 <= end; j += 4) strip.template operator()<4>(j);
    for (; j < end; ++j) strip.template operator()<1>(j);
  });
}

// done(row, first channel, lanes, sums) for the products of Rows rows of a with the channels of vectors [v, v + Vectors).
// lanes: of a vector; only a single one may be half full.
template <class W, int Rows, int Vectors, class Lanes, class Done>
inline void row_tile(const float* a, int64_t a_row, const float* b, int64_t first_row, int64_t words, int64_t channels,
                     int64_t v, Lanes lanes, const Done& done) {
  Vec acc[Rows][Vectors] = {};
  for (int64_t k = 0; k < words; ++k) {
    Vec values[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) values[j] = load(b + k * channels + (v + j) * kLanes, lanes);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      int32_t word;
      std::memcpy(&word, a + (first_row + i) * a_row + k, sizeof word);
      const Vec factor = (Vec)(word - Int{});
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) acc[i][j] = W::multiply_add(factor, values[j], acc[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) done(first_row + i, (v + j) * kLanes, lanes, acc[i][j]);
}

// a [rows, depth] times b [depth, channels], channels a multiple of 8; `done` as above takes the sums.
template <class W, class Done>
inline void product(const float* a, const float* b, int64_t rows, int64_t depth, int64_t channels, const Done& done) {
  constexpr int kTileRows = kLanes == 16 ? 6 : 3, kTileVectors = kLanes == 16 ? 4 : 2;
  const Operand left = row_words<W>(a, rows, depth), right = paired_rows<W>(b, depth, channels);
  const int64_t a_row = words_of_row<W>(depth), words = words_of<W>(depth);
  if constexpr (W::kTiles)
    return tile_product<W>(left.words, a_row, rows, a_row, right.words, channels, channels,
                           [&](int64_t row, int64_t c, Vec sum) {
      with_lanes(c / kLanes, channels, [&](auto lanes) { done(row, c, lanes, sum); });
    });
  const int64_t whole = channels / kLanes, vectors = (channels + kLanes - 1) / kLanes;
  for_each_range((vectors + kTileVectors - 1) / kTileVectors, rows * words * kTileVectors * kLanes,
                 [&](int64_t begin, int64_t end) {
    const auto strip = [&]<int Vectors>(int64_t v, auto lanes) {
      int64_t i = 0;
      for (; i + kTileRows <= rows; i += kTileRows)
        row_tile<W, kTileRows, Vectors>(left.words, a_row, right.words, i, words, channels, v, lanes, done);
      for (; i < rows; ++i)
        row_tile<W, 1, Vectors>(left.words, a_row, right.words, i, words, channels, v, lanes, done);
    };
    int64_t v = begin * kTileVectors;
    const int64_t last = std::min(vectors, end * kTileVectors);
    for (; v + kTileVectors <= std::min(whole, last); v += kTileVectors)
      strip.template operator()<kTileVectors>(v, AllLanes{});
    for (; v < last; ++v) with_lanes(v, channels, [&](auto lanes) { strip.template operator()<1>(v, lanes); });
  });
}

// to [columns, rows] = the transpose of from [rows, columns]: squares of 4 x 4, as far as they fit, in a quarter of the time
// that single elements take.
inline void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
  typedef float Quad __attribute__((vector_size(16), aligned(4)));
  const auto square = [=](int64_t i, int64_t j) {
    const auto row = [&](int64_t k) { return *(const Quad*)(from + (i + k) * columns + j); };
    const auto column = [&](int64_t k) -> Quad& { return *(Quad*)(to + (j + k) * rows + i); };
    const Quad a = row(0), b = row(1), c = row(2), d = row(3);
    const Quad ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Quad cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    column(0) = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
    column(1) = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    column(2) = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
    column(3) = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
  };
  for_each_range((rows + 3) / 4, kCopyWork * 4 * columns, [&](int64_t begin, int64_t end) {
    for (int64_t i = 4 * begin; i < std::min(rows, 4 * end); i += 4) {
      const int64_t whole = i + 4 <= rows ? columns / 4 * 4 : 0;
      for (int64_t j = 0; j < whole; j += 4) square(i, j);
      for (int64_t j = whole; j < columns; ++j)
        for (int64_t k = i; k < std::min(rows, i + 4); ++k) to[j * rows + k] = from[k * columns + j];
    }
  });
}

// The MLP's weights, checked and as floats.
struct SqueezeWeights {
  int64_t channels, squeezed;
  FloatWeights reduce, reduce_bias, expand, expand_bias;

  SqueezeWeights(const Tensor& w_reduce, const Tensor& b_reduce, const Tensor& w_expand, const Tensor& b_expand,
                 int64_t channels)
      : channels(channels), squeezed(b_reduce.numel()), reduce(as_floats(w_reduce, "w_reduce")),
        reduce_bias(as_floats(b_reduce, "b_reduce")), expand(as_floats(w_expand, "w_expand")),
        expand_bias(as_floats(b_expand, "b_expand")) {
    STD_TORCH_CHECK(channels % 8 == 0, "w_reduce: got ", channels, " channels, must be a multiple of 8");
    STD_TORCH_CHECK(w_reduce.numel() == squeezed * channels, "w_reduce: must be [", squeezed, ", ", channels, ", 1, 1]");
    STD_TORCH_CHECK(w_expand.numel() == squeezed * channels, "w_expand: must be [", channels, ", ", squeezed, ", 1, 1]");
    STD_TORCH_CHECK(b_expand.numel() == channels, "b_expand: must be for ", channels, " channels");
  }

  // [N, squeezed]: before SiLU
  template <class W>
  Tensor reduced(const float* means, int64_t images) const {
    Tensor out = empty_floats({images, squeezed});
    product_transposed<W>(means, reduce.data, images, squeezed, channels, reduce_bias.data, floats(out));
    return out;
  }
  Tensor expand_transposed() const {
    Tensor out = empty_floats({squeezed, channels});
    transpose(expand.data, channels, squeezed, floats(out));
    return out;
  }
};

// f(from) for all floats, a vector at a time.
template <class F>
inline Tensor map(const Tensor& from, const F& f) {
  const int64_t count = from.numel();
  Tensor to = empty_floats(from.sizes());
  const float* in = floats(from);
  float* out = floats(to);
  for_each_range((count + kLanes - 1) / kLanes, 32 * kLanes, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin * kLanes; i < std::min(count, end * kLanes); i += kLanes) {
      const Vec value = f(load_first(in + i, count - i));
      std::memcpy(out + i, &value, std::min<int64_t>(kLanes, count - i) * sizeof(float));
    }
  });
  return to;
}

// Calls f.template operator()<W>() with the words that products for activations of a dtype are made of. Small ones take as
// long to convert (Zen 5, 128 images at 32 px: a step of the study's width variant, of up to 576 squeezed channels, takes
// 11 % less in bf16, of its baseline, of up to 288, 2 %; B0's, of up to 48, as long).
template <class F>
inline void with_words(ScalarType dtype, int64_t images, int64_t squeezed, const F& f) {
  constexpr int64_t kManyHidden = 1 << 14;
  if (dtype == ScalarType::BFloat16 && images * squeezed >= kManyHidden)
    f.template operator()<ProductWords<BFloat16>>();
  else
    f.template operator()<FloatWords>();
}

Tensor squeeze_gate(const Tensor& sums, int64_t pixels, const Tensor& w_reduce, const Tensor& b_reduce,
                    const Tensor& w_expand, const Tensor& b_expand, ScalarType dtype) {
  STD_TORCH_CHECK(sums.dim() == 2, "sums: must be [N, C]");
  const int64_t images = sums.size(0), channels = sums.size(1);
  const float* pooled = check_floats(sums, "sums", channels, images);
  const SqueezeWeights mlp(w_reduce, b_reduce, w_expand, b_expand, channels);
  Tensor squeeze = empty_floats({2, images, channels});
  float *means = floats(squeeze), *gate = means + images * channels;
  for_each_range(images * channels, 16, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) means[i] = pooled[i] / (float)pixels;
  });
  with_words(dtype, images, mlp.squeezed, [&]<class W>() {
    const Tensor hidden = map(mlp.reduced<W>(means, images), silu<float>), expand = mlp.expand_transposed();
    product<W>(floats(hidden), floats(expand), images, mlp.squeezed, channels, [=, bias = mlp.expand_bias.data](
                   int64_t n, int64_t c, auto lanes, Vec sum) {
      store(gate + n * channels + c, sigmoid<float>(sum + load(bias + c, lanes)), lanes);
    });
  });
  return squeeze;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> squeeze_gate_grad(const Tensor& squeeze, const Tensor& dgate,
                                                                     int64_t pixels, const Tensor& w_reduce,
                                                                     const Tensor& b_reduce, const Tensor& w_expand,
                                                                     const Tensor& b_expand, ScalarType dtype) {
  STD_TORCH_CHECK(squeeze.dim() == 3 && squeeze.size(0) == 2, "squeeze: must be [2, N, C]");
  const int64_t images = squeeze.size(1), channels = squeeze.size(2);
  const float *means = check_floats(squeeze, "squeeze", channels, 2 * images), *gate = means + images * channels;
  const float* outer = check_floats(dgate, "dgate", channels, images);
  const SqueezeWeights mlp(w_reduce, b_reduce, w_expand, b_expand, channels);
  const int64_t squeezed = mlp.squeezed;
  Tensor pooled_grad = empty_floats({images, channels});
  Tensor dw_reduce = empty_floats(w_reduce.sizes()), db_reduce = empty_floats({squeezed});
  Tensor dw_expand = empty_floats(w_expand.sizes()), db_expand = empty_floats({channels});

  Tensor expanded_grad = empty_floats({images, channels});
  float *dexpanded = floats(expanded_grad), *dbias = floats(db_expand);
  for_each_range((channels + kLanes - 1) / kLanes, images * kLanes, [=](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v)
      with_lanes(v, channels, [&](auto lanes) {
        Vec sum = {};
        for (int64_t n = 0; n < images; ++n) {
          const int64_t i = n * channels + v * kLanes;
          const Vec s = load(gate + i, lanes), d = load(outer + i, lanes) * s * (1.f - s);
          store(dexpanded + i, d, lanes);
          sum += d;
        }
        store(dbias + v * kLanes, sum, lanes);
      });
  });

  with_words(dtype, images, squeezed, [&]<class W>() {
    const Tensor reduced = mlp.reduced<W>(means, images), hidden = map(reduced, silu<float>);
    const Tensor slope = map(reduced, [](Vec u) {
      const Vec s = sigmoid<float>(u);
      return silu_slope(s, u * s);
    });
    Tensor reduced_grad = empty_floats({images, squeezed});
    product_transposed<W>(dexpanded, floats(mlp.expand_transposed()), images, squeezed, channels, nullptr,
                          floats(reduced_grad));
    float *dreduced = floats(reduced_grad), *sums = floats(db_reduce);
    const float* factor = floats(slope);
    std::fill_n(sums, squeezed, 0.f);
    for (int64_t n = 0; n < images; ++n, dreduced += squeezed, factor += squeezed)
      for (int64_t r = 0; r < squeezed; ++r) sums[r] += dreduced[r] *= factor[r];
    dreduced = floats(reduced_grad);

    const auto into = [channels](float* out, float factor) {
      return [=](int64_t row, int64_t c, auto lanes, Vec sum) { store(out + row * channels + c, sum * factor, lanes); };
    };
    product<W>(dreduced, mlp.reduce.data, images, squeezed, channels, into(floats(pooled_grad), 1.f / (float)pixels));
    Tensor rows = empty_floats({squeezed, images}), expand_grad = empty_floats({squeezed, channels});
    transpose(dreduced, images, squeezed, floats(rows));
    product<W>(floats(rows), means, squeezed, images, channels, into(floats(dw_reduce), 1.f));
    transpose(floats(hidden), images, squeezed, floats(rows));
    product<W>(floats(rows), dexpanded, squeezed, images, channels, into(floats(expand_grad), 1.f));
    transpose(floats(expand_grad), squeezed, channels, floats(dw_expand));
  });
  return {pooled_grad, dw_reduce, db_reduce, dw_expand, db_expand};
}

}  // namespace effnet_fast
