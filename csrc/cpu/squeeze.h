// Squeeze-excite's two-layer MLP and its gradient, on [N, C]: products too small for a library's to be quick.
#pragma once

#include "tensors.h"

namespace effnet_fast {

// The least work, in multiply-adds, that is worth handing to another thread: some microseconds.
constexpr int64_t kMinProductWork = 1 << 19;

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

// out[i][j] = sum over k of a[i][k] * b[j][k] for i < Rows and j < Columns; k in whole vectors, the last perhaps half.
template <int Rows, int Columns>
inline void dot_tile(const float* a, const float* b, int64_t depth, float* out, int64_t out_stride) {
  Vec acc[Rows][Columns] = {};
  for (int64_t v = 0; v * kLanes < depth; ++v)
    with_lanes(v, depth, [&](auto lanes) {
      Vec row[Rows];
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) row[i] = load(a + i * depth + v * kLanes, lanes);
#pragma GCC unroll 8
      for (int j = 0; j < Columns; ++j) {
        const Vec column = load(b + j * depth + v * kLanes, lanes);
#pragma GCC unroll 8
        for (int i = 0; i < Rows; ++i) acc[i][j] += row[i] * column;
      }
    });
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Columns; ++j) out[i * out_stride + j] = sum_of_lanes(acc[i][j]);
}

// out [rows, columns] = a [rows, depth] times the transpose of b [columns, depth]; depth a multiple of 8.
inline void product_transposed(const float* a, const float* b, int64_t rows, int64_t columns, int64_t depth, float* out) {
  for_each_range(columns, rows * depth, [&](int64_t begin, int64_t end) {
    const auto strip = [&]<int Columns>(int64_t j) {
      int64_t i = 0;
      for (; i + 4 <= rows; i += 4)
        dot_tile<4, Columns>(a + i * depth, b + j * depth, depth, out + i * columns + j, columns);
      for (; i < rows; ++i) dot_tile<1, Columns>(a + i * depth, b + j * depth, depth, out + i * columns + j, columns);
    };
    int64_t j = begin;
    for (; j + 4 <= end; j += 4) strip.template operator()<4>(j);
    for (; j < end; ++j) strip.template operator()<1>(j);
  });
}

// done(row, first channel, lanes, sums) for the products of Rows rows of a with the channels of vectors [v, v + Vectors).
// lanes: of a vector; only a single one may be half full.
template <int Rows, int Vectors, class Lanes, class Done>
inline void row_tile(const float* a, const float* b, int64_t first_row, int64_t depth, int64_t channels, int64_t v,
                     Lanes lanes, const Done& done) {
  Vec acc[Rows][Vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec values[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) values[j] = load(b + k * channels + (v + j) * kLanes, lanes);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const Vec factor = broadcast(a[(first_row + i) * depth + k]);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) acc[i][j] += factor * values[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) done(first_row + i, (v + j) * kLanes, lanes, acc[i][j]);
}

// a [rows, depth] times b [depth, channels], channels a multiple of 8; `done` as above takes the sums.
template <class Done>
inline void product(const float* a, const float* b, int64_t rows, int64_t depth, int64_t channels, const Done& done) {
  constexpr int kTileRows = kLanes == 16 ? 6 : 3, kTileVectors = kLanes == 16 ? 4 : 2;
  const int64_t whole = channels / kLanes, vectors = (channels + kLanes - 1) / kLanes;
  for_each_range((vectors + kTileVectors - 1) / kTileVectors, rows * depth * kTileVectors * kLanes,
                 [&](int64_t begin, int64_t end) {
    const auto strip = [&]<int Vectors>(int64_t v, auto lanes) {
      int64_t i = 0;
      for (; i + kTileRows <= rows; i += kTileRows)
        row_tile<kTileRows, Vectors>(a, b, i, depth, channels, v, lanes, done);
      for (; i < rows; ++i) row_tile<1, Vectors>(a, b, i, depth, channels, v, lanes, done);
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
  for_each_range((rows + 3) / 4, 4 * columns, [&](int64_t begin, int64_t end) {
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
  std::vector<float> reduced(const float* means, int64_t images) const {
    std::vector<float> out(images * squeezed);
    product_transposed(means, reduce.data, images, squeezed, channels, out.data());
    for (int64_t n = 0; n < images; ++n)
      for (int64_t r = 0; r < squeezed; ++r) out[n * squeezed + r] += reduce_bias.data[r];
    return out;
  }
  std::vector<float> expand_transposed() const {
    std::vector<float> out(squeezed * channels);
    transpose(expand.data, channels, squeezed, out.data());
    return out;
  }
};

// to = f(from) for so many floats, a vector at a time.
template <class F>
inline std::vector<float> map(const std::vector<float>& from, const F& f) {
  std::vector<float> to(from.size());
  for (size_t i = 0; i < from.size(); i += kLanes) {
    float lane[kLanes] = {};
    const size_t count = std::min<size_t>(kLanes, from.size() - i);
    std::memcpy(lane, &from[i], count * sizeof(float));
    store(lane, f(load(lane)));
    std::memcpy(&to[i], lane, count * sizeof(float));
  }
  return to;
}

Tensor squeeze_gate(const Tensor& sums, int64_t pixels, const Tensor& w_reduce, const Tensor& b_reduce,
                    const Tensor& w_expand, const Tensor& b_expand) {
  STD_TORCH_CHECK(sums.dim() == 2, "sums: must be [N, C]");
  const int64_t images = sums.size(0), channels = sums.size(1);
  const float* pooled = check_floats(sums, "sums", channels, images);
  const SqueezeWeights mlp(w_reduce, b_reduce, w_expand, b_expand, channels);
  Tensor squeeze = empty_floats({2, images, channels});
  float *means = floats(squeeze), *gate = means + images * channels;
  for (int64_t i = 0; i < images * channels; ++i) means[i] = pooled[i] / (float)pixels;
  const std::vector<float> hidden = map(mlp.reduced(means, images), silu<float>);
  const std::vector<float> expand = mlp.expand_transposed();
  product(hidden.data(), expand.data(), images, mlp.squeezed, channels, [&](int64_t n, int64_t c, auto lanes, Vec sum) {
    store(gate + n * channels + c, sigmoid<float>(sum + load(mlp.expand_bias.data + c, lanes)), lanes);
  });
  return squeeze;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> squeeze_gate_grad(const Tensor& squeeze, const Tensor& dgate,
                                                                     int64_t pixels, const Tensor& w_reduce,
                                                                     const Tensor& b_reduce, const Tensor& w_expand,
                                                                     const Tensor& b_expand) {
  STD_TORCH_CHECK(squeeze.dim() == 3 && squeeze.size(0) == 2, "squeeze: must be [2, N, C]");
  const int64_t images = squeeze.size(1), channels = squeeze.size(2);
  const float *means = check_floats(squeeze, "squeeze", channels, 2 * images), *gate = means + images * channels;
  const float* outer = check_floats(dgate, "dgate", channels, images);
  const SqueezeWeights mlp(w_reduce, b_reduce, w_expand, b_expand, channels);
  const int64_t squeezed = mlp.squeezed;
  Tensor pooled_grad = empty_floats({images, channels});
  Tensor dw_reduce = empty_floats(w_reduce.sizes()), db_reduce = empty_floats({squeezed});
  Tensor dw_expand = empty_floats(w_expand.sizes()), db_expand = empty_floats({channels});

  std::vector<float> dexpanded(images * channels);
  for_each_range((channels + kLanes - 1) / kLanes, images * kLanes, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v)
      with_lanes(v, channels, [&](auto lanes) {
        Vec sum = {};
        for (int64_t n = 0; n < images; ++n) {
          const int64_t i = n * channels + v * kLanes;
          const Vec s = load(gate + i, lanes), d = load(outer + i, lanes) * s * (1.f - s);
          store(&dexpanded[i], d, lanes);
          sum += d;
        }
        store(floats(db_expand) + v * kLanes, sum, lanes);
      });
  });

  const std::vector<float> reduced = mlp.reduced(means, images), hidden = map(reduced, silu<float>);
  const std::vector<float> slope = map(reduced, [](Vec u) {
    const Vec s = sigmoid<float>(u);
    return silu_slope(s, u * s);
  });
  std::vector<float> dreduced(images * squeezed);
  product_transposed(dexpanded.data(), mlp.expand_transposed().data(), images, squeezed, channels, dreduced.data());
  std::fill_n(floats(db_reduce), squeezed, 0.f);
  for (int64_t n = 0; n < images; ++n)
    for (int64_t r = 0; r < squeezed; ++r) {
      const int64_t i = n * squeezed + r;
      dreduced[i] *= slope[i];
      floats(db_reduce)[r] += dreduced[i];
    }

  const auto into = [channels](float* out, float factor) {
    return [=](int64_t row, int64_t c, auto lanes, Vec sum) { store(out + row * channels + c, sum * factor, lanes); };
  };
  product(dreduced.data(), mlp.reduce.data, images, squeezed, channels, into(floats(pooled_grad), 1.f / (float)pixels));
  std::vector<float> rows(squeezed * images), expand_grad(squeezed * channels);
  transpose(dreduced.data(), images, squeezed, rows.data());
  product(rows.data(), means, squeezed, images, channels, into(floats(dw_reduce), 1.f));
  transpose(hidden.data(), images, squeezed, rows.data());
  product(rows.data(), dexpanded.data(), squeezed, images, channels, into(expand_grad.data(), 1.f));
  transpose(expand_grad.data(), squeezed, channels, floats(dw_expand));
  return {pooled_grad, dw_reduce, db_reduce, dw_expand, db_expand};
}

}  // namespace effnet_fast
