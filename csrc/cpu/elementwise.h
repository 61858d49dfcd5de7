// The passes that touch each element once: statistics, pooling, activation, and their backward.
#pragma once

#include <array>

#include "output_grad.h"

namespace effnet_fast {

// A task of the reducing passes is one image and a group of channels: whole images when they are enough to go round,
// else the channels are split. Every channel sees its pixels in the same order either way.
struct ImageTasks {
  int64_t images, groups, vectors;
  ImageTasks(const Shape& s) : images(s.n), vectors(s.vectors()) {
    const int64_t threads = torch::stable::get_num_threads();
    groups = std::min<int64_t>(vectors, (threads + std::max<int64_t>(images, 1) - 1) / std::max<int64_t>(images, 1));
  }
  template <class F>
  void run(const F& f) const {
    for_each_task(images * groups, [&](int64_t task) {
      const int64_t image = task / groups, group = task % groups;
      f(image, vectors * group / groups, vectors * (group + 1) / groups);
    });
  }
};

// Pixels that a reducing pass keeps in the first-level cache while it walks over their channels.
constexpr int64_t kTile = 32;

// Sums `Sums` values per channel over the pixels of one image. f(c, lanes) loads what it needs of the channels from c on
// and returns the body that a pixel's vector is given to: body(element offset, accumulators).
template <int Sums, class F>
inline void reduce_pixels(const Shape& s, int64_t v_begin, int64_t v_end, float* const* out, const F& f) {
  for (int64_t tile = 0; tile < s.pixels(); tile += kTile) {
    const int64_t end = std::min(s.pixels(), tile + kTile);
    for (int64_t v = v_begin; v < v_end; ++v)
      with_lanes(v, s.c, [&](auto lanes) {
        const int64_t c = v * kLanes;
        const auto body = f(c, lanes);
        Vec acc[Sums] = {};
        for (int64_t p = tile; p < end; ++p) body(p * s.c + c, acc);
        for (int i = 0; i < Sums; ++i) {
          float* sum = out[i] + c;
          store(sum, tile == 0 ? acc[i] : load(sum, lanes) + acc[i], lanes);
        }
      });
  }
}

std::tuple<Tensor, Tensor> channel_stats(const Tensor& x) {
  const Shape s = check_nhwc(x, "x");
  Tensor mean = empty_floats({s.c}), m2 = empty_floats({s.c});
  Tensor means = empty_floats({s.n, s.c}), m2s = empty_floats({s.n, s.c});
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* data = (const T*)x.const_data_ptr();
    ImageTasks(s).run([&](int64_t n, int64_t v_begin, int64_t v_end) {
      const T* image = data + n * s.pixels() * s.c;
      float *mean_n = floats(means) + n * s.c, *m2_n = floats(m2s) + n * s.c;
      float* const sums[2] = {mean_n, m2_n};
      // shifted by the image's first pixel, so that a large mean does not cancel in the squares
      reduce_pixels<2>(s, v_begin, v_end, sums, [&](int64_t c, auto lanes) {
        return [=, &s, first = load(image + c, lanes)](int64_t at, Vec* acc) {
          prefetch(image + at + kTile * s.c);
          const Vec d = load(image + at, lanes) - first;
          acc[0] += d;
          acc[1] += d * d;
        };
      });
      const float count = (float)s.pixels();
      for (int64_t c = v_begin * kLanes; c < std::min(s.c, v_end * kLanes); ++c) {
        T first[kLanes] = {image[c]};
        const float d = mean_n[c] / count;
        m2_n[c] -= mean_n[c] * d;
        mean_n[c] = load(first)[0] + d;
      }
    });
  });
  combine_moments(floats(means), floats(m2s), s.pixels() > 0 ? s.n : 0, s.c, [&](int64_t) { return s.pixels(); },
                  floats(mean), floats(m2));
  return {mean, m2};
}

Tensor pool(const Tensor& y, const Tensor& scale, const Tensor& shift, bool silu_) {
  const Shape s = check_nhwc(y, "y");
  const float *sc = check_floats(scale, "scale", s.c), *sh = check_floats(shift, "shift", s.c);
  Tensor out = torch::stable::new_zeros(scale, {s.n, s.c});
  dispatch(y, "y", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* data = (const T*)y.const_data_ptr();
    ImageTasks(s).run([&](int64_t n, int64_t v_begin, int64_t v_end) {
      const T* image = data + n * s.pixels() * s.c;
      float* const sums[1] = {floats(out) + n * s.c};
      reduce_pixels<1>(s, v_begin, v_end, sums, [&](int64_t c, auto lanes) {
        return [=, &s, scale = load(sc + c, lanes), shift = load(sh + c, lanes)](int64_t at, Vec* acc) {
          prefetch(image + at + kTile * s.c);
          const Vec u = load(image + at, lanes) * scale + shift;
          acc[0] += silu_ ? silu<T>(u) : u;
        };
      });
    });
  });
  return out;
}

// Pixels of a block of `for_each_vector`: few, so that its rows are read as parallel streams, but enough to share the loaded
// operands.
constexpr int64_t kBlock = 8;

// Visits every vector of a tensor, in parallel over blocks of pixels. f(image, c, lanes) loads what it needs of the
// channels from c on and returns the body that is given element offsets.
template <class F>
inline void for_each_vector(const Shape& s, const F& f) {
  const int64_t blocks = (s.pixels() + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, 2048 / std::max<int64_t>(s.c, 1));
  torch::stable::parallel_for(0, s.n * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t n = block / blocks, first = n * s.pixels() + block % blocks * kBlock;
      const int64_t last = std::min(first + kBlock, (n + 1) * s.pixels());
      for (int64_t v = 0; v < s.vectors(); ++v)
        with_lanes(v, s.c, [&](auto lanes) {
          const int64_t c = v * kLanes;
          const auto body = f(n, c, lanes);
          for (int64_t p = first; p < last; ++p) body(p * s.c + c);
        });
    }
  });
}

Tensor apply(const Tensor& y, const Tensor& scale, const Tensor& shift, bool silu_, const OptionalTensor& gate,
             const OptionalTensor& residual) {
  const Shape s = check_nhwc(y, "y");
  const float *sc = check_floats(scale, "scale", s.c), *sh = check_floats(shift, "shift", s.c);
  const float* g = check_floats(gate, "gate", s.c, s.n);
  if (residual) check_like(*residual, "residual", y, "y");
  Tensor out = empty_nhwc(s, y.scalar_type());
  const int64_t ahead = 2 * kBlock * s.c;
  dispatch(y, "y", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* in = (const T*)y.const_data_ptr();
    const T* res = residual ? (const T*)residual->const_data_ptr() : nullptr;
    T* o = (T*)out.mutable_data_ptr();
    for_each_vector(s, [&](int64_t n, int64_t c, auto lanes) {
      const Vec scale = load(sc + c, lanes), shift = load(sh + c, lanes);
      const Vec factor = g ? load(g + n * s.c + c, lanes) : broadcast(1.f);
      return [=](int64_t at) {
        prefetch(in + at + ahead);
        prefetch_to_write(o + at + ahead);
        Vec z = load(in + at, lanes) * scale + shift;
        if (silu_) z = silu<T>(z);
        z *= factor;
        if (res) {
          prefetch(res + at + ahead);
          z += load(res + at, lanes);
        }
        store(o + at, z, lanes);
      };
    });
  });
  return out;
}

Tensor backward_sums(const Tensor& grad, const Tensor& y, const Tensor& scale, const Tensor& shift, const Tensor& mean,
                     const Tensor& rstd, bool silu_) {
  check_like(grad, "grad", y, "y");
  const Shape s = check_nhwc(y, "y");
  const float *sc = check_floats(scale, "scale", s.c), *sh = check_floats(shift, "shift", s.c);
  const float *mu = check_floats(mean, "mean", s.c), *r = check_floats(rstd, "rstd", s.c);
  const int64_t sums = silu_ ? 5 : 2;
  Tensor out = torch::stable::new_zeros(scale, {sums, s.n, s.c});
  dispatch(y, "y", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *g = (const T*)grad.const_data_ptr(), *in = (const T*)y.const_data_ptr();
    ImageTasks(s).run([&](int64_t n, int64_t v_begin, int64_t v_end) {
      const int64_t image = n * s.pixels() * s.c;
      float* sum[5];
      for (int64_t i = 0; i < sums; ++i) sum[i] = floats(out) + (i * s.n + n) * s.c;
      const auto operands = [&](int64_t c, auto lanes) {
        return std::array{load(sc + c, lanes), load(sh + c, lanes), load(mu + c, lanes), load(r + c, lanes)};
      };
      if (silu_)
        reduce_pixels<5>(s, v_begin, v_end, sum, [&](int64_t c, auto lanes) {
          return [=, &s, ops = operands(c, lanes)](int64_t at, Vec* acc) {
            const auto [scale, shift, mean, rstd] = ops;
            prefetch(g + image + at + kTile * s.c);
            prefetch(in + image + at + kTile * s.c);
            const Vec dz = load(g + image + at, lanes), value = load(in + image + at, lanes);
            const Vec u = value * scale + shift, hat = (value - mean) * rstd;
            const Vec sig = sigmoid<T>(u), z = u * sig, slope = silu_slope(sig, z), du = dz * slope;
            acc[0] += dz * z;
            acc[1] += du;
            acc[2] += slope;
            acc[3] += du * hat;
            acc[4] += slope * hat;
          };
        });
      else
        reduce_pixels<2>(s, v_begin, v_end, sum, [&](int64_t c, auto lanes) {
          return [=, &s, ops = operands(c, lanes)](int64_t at, Vec* acc) {
            prefetch(g + image + at + kTile * s.c);
            prefetch(in + image + at + kTile * s.c);
            const Vec dz = load(g + image + at, lanes);
            acc[0] += dz;
            acc[1] += dz * ((load(in + image + at, lanes) - ops[2]) * ops[3]);
          };
        });
    });
  });
  return out;
}

Tensor backward_apply(const Tensor& grad, const Tensor& y, const Tensor& scale, const Tensor& shift, const Tensor& mean,
                      bool silu_, const OptionalTensor& gate, const OptionalTensor& pooled_grad, const Tensor& a,
                      const Tensor& b) {
  check_like(grad, "grad", y, "y");
  const Shape s = check_nhwc(y, "y");
  const OutputGrad output_grad(scale, shift, mean, gate, pooled_grad, a, b, silu_, true, s);
  Tensor out = empty_nhwc(s, y.scalar_type());
  const int64_t ahead = 2 * kBlock * s.c;
  dispatch(y, "y", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *g = (const T*)grad.const_data_ptr(), *in = (const T*)y.const_data_ptr();
    T* o = (T*)out.mutable_data_ptr();
    for_each_vector(s, [&](int64_t n, int64_t c, auto lanes) {
      const auto dy = output_grad.of<T>(n, s.c, c, lanes);
      return [=](int64_t at) {
        prefetch(g + at + ahead);
        prefetch(in + at + ahead);
        prefetch_to_write(o + at + ahead);
        store(o + at, dy(load(g + at, lanes), load(in + at, lanes)), lanes);
      };
    });
  });
  return out;
}

}  // namespace effnet_fast
