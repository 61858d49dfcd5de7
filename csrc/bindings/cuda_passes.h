// The passes on torch tensors, over the launchers of csrc/cuda: checks, allocation, launch. The file that includes this
// defines the class and the three functions below for its device and registers the passes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "../cuda/launch.h"

namespace effnet_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Makes t's device the current one while it lives.
class DeviceGuard;
void check_device(const Tensor& t, const char* name);
// The current stream of t's device, and what is known of the device.
Launch launch_on(const Tensor& t);
void check_launch(const char* pass);

inline Shape check_nhwc(const Tensor& t, const char* name) {
  check_device(t, name);
  STD_TORCH_CHECK(t.dim() == 4, name, ": got ", t.dim(), " dimensions, must be 4 (N, C, H, W)");
  const int64_t n = t.size(0), c = t.size(1), h = t.size(2), w = t.size(3);
  STD_TORCH_CHECK(c > 0 && h > 0 && w > 0, name, ": must have channels and pixels");
  // images, and values within one up to a few rows beyond its end, are counted in 32 bits
  STD_TORCH_CHECK(c <= (1 << 24) && h <= (1 << 24) && w <= (1 << 24) && (h + 16) * w * c <= INT32_MAX && n <= (1 << 24), name,
                  ": an image must be below 2^31 values, and a batch at most 2^24 images");
  // strides of dimensions of size 1 carry no meaning, and those of an empty tensor none at all
  const int64_t strides[4] = {h * w * c, 1, w * c, c};
  for (int d = 0; d < 4 && n > 0; ++d)
    STD_TORCH_CHECK(t.size(d) == 1 || t.stride(d) == strides[d], name, ": must be contiguous in channels_last format");
  return {n, (int)c, (int)h, (int)w};
}

inline void check_like(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  const Shape a = check_nhwc(t, name), b = check_nhwc(other, other_name);
  STD_TORCH_CHECK(a.n == b.n && a.c == b.c && a.h == b.h && a.w == b.w, name, ": must have the shape of ", other_name);
  STD_TORCH_CHECK(t.scalar_type() == other.scalar_type(), name, ": must have the dtype of ", other_name);
}

// Small fp32 operands: [C], or [N, C] with rows = N.
inline const float* check_floats(const Tensor& t, const char* name, int64_t channels, int64_t rows = 1) {
  check_device(t, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, ": must be float32");
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == channels * rows && t.size(t.dim() - 1) == channels, name,
                  ": must be contiguous with ", channels, " channels");
  return (const float*)t.const_data_ptr();
}
inline const float* check_floats(const OptionalTensor& t, const char* name, int64_t channels, int64_t rows = 1) {
  return t.has_value() ? check_floats(*t, name, channels, rows) : nullptr;
}

inline Window make_window(const Shape& s, const Tensor& weight, int64_t stride, bool same) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == s.c && weight.size(1) == 1 && weight.size(2) == weight.size(3),
                  "weight: must be [", s.c, ", 1, k, k]");
  const int k = (int)weight.size(2), step = (int)stride;
  STD_TORCH_CHECK(k == 3 || k == 5 || k == 7, "weight: got a kernel of ", k, ", must be 3, 5 or 7");
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride: got ", stride, ", must be 1 or 2");
  const int out_h = ceil_div(s.h, step), out_w = ceil_div(s.w, step);  // of either padding, for odd kernels
  if (!same) return {k, step, k / 2, k / 2, out_h, out_w};
  const auto before = [&](int size, int outputs) { return std::max((outputs - 1) * step + k - size, 0) / 2; };
  return {k, step, before(s.h, out_h), before(s.w, out_w), out_h, out_w};
}

// The weight as the kernels read it. It may come in a storage type, where a whole model is in one.
inline Tensor float_weight(const Tensor& weight) {
  check_device(weight, "weight");
  return torch::stable::contiguous(torch::stable::to(weight, ScalarType::Float));
}

inline Tensor empty_nhwc(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  return torch::stable::empty({n, c, h, w}, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}
inline Tensor empty_floats(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return torch::stable::empty(sizes, ScalarType::Float, std::nullopt, like.device());
}
inline float* floats(const Tensor& t) { return (float*)t.mutable_data_ptr(); }

template <class T>
const T* data(const Tensor& t) { return (const T*)t.const_data_ptr(); }
template <class T>
const T* data(const OptionalTensor& t) { return t.has_value() ? data<T>(*t) : nullptr; }

// Vectors of 16 bytes where the channels and the addresses allow it.
inline Launch launch_over(const Tensor& like, std::initializer_list<const Tensor*> activations) {
  Launch on = launch_on(like);
  const int bytes = like.scalar_type() == ScalarType::Float ? 4 : 2;
  on.vector = like.size(1) % 8 == 0 ? 16 / bytes : 1;
  for (const Tensor* t : activations)
    if ((uintptr_t)t->const_data_ptr() % 16) on.vector = 1;
  return on;
}
inline const Tensor* or_else(const OptionalTensor& t, const Tensor& other) { return t.has_value() ? &*t : &other; }

// Calls f with a null pointer of the storage type, on t's device.
template <class F, class Guard = DeviceGuard>
void dispatch(const Tensor& t, const char* name, const F& f) {
  const Guard guard(t);
  switch (t.scalar_type()) {
    case ScalarType::Float: return f((float*)nullptr);
    case ScalarType::BFloat16: return f((__nv_bfloat16*)nullptr);
    case ScalarType::Half: return f((__half*)nullptr);
    default: STD_TORCH_CHECK(false, name, ": dtype must be float32, bfloat16 or float16");
  }
}

// Calls f, which launches, on t's device.
template <class F, class Guard = DeviceGuard>
void on_device(const Tensor& t, const F& f) {
  const Guard guard(t);
  f(launch_on(t));
}

inline std::tuple<Tensor, Tensor> channel_stats(const Tensor& x) {
  const Shape s = check_nhwc(x, "x");
  Tensor mean = empty_floats(x, {s.c}), m2 = empty_floats(x, {s.c});
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Launch on = launch_over(x, {&x});
    const Tensor partials = empty_floats(x, {channel_stats_partials(s, on)});
    Passes<T>::channel_stats(data<T>(x), floats(mean), floats(m2), s, floats(partials), on);
  });
  check_launch("channel_stats");
  return {mean, m2};
}

inline Tensor pool(const Tensor& y, const Tensor& scale, const Tensor& shift, bool silu) {
  const Shape s = check_nhwc(y, "y");
  const float *sc = check_floats(scale, "scale", s.c), *sh = check_floats(shift, "shift", s.c);
  Tensor out = empty_floats(y, {s.n, s.c});
  dispatch(y, "y", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Launch on = launch_over(y, {&y});
    const Tensor partials = empty_floats(y, {pixel_partials(s, 1, on)});
    Passes<T>::pool(data<T>(y), sc, sh, silu, floats(out), s, floats(partials), on);
  });
  check_launch("pool");
  return out;
}

inline Tensor apply(const Tensor& y, const Tensor& scale, const Tensor& shift, bool silu, const OptionalTensor& gate,
                    const OptionalTensor& residual) {
  const Shape s = check_nhwc(y, "y");
  const ApplyOperands op{check_floats(scale, "scale", s.c), check_floats(shift, "shift", s.c),
                         check_floats(gate, "gate", s.c, s.n), silu};
  if (residual) check_like(*residual, "residual", y, "y");
  Tensor out = empty_nhwc(y, s.n, s.c, s.h, s.w);
  dispatch(y, "y", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Launch on = launch_over(y, {&y, or_else(residual, y), &out});
    Passes<T>::apply(data<T>(y), op, data<T>(residual), (T*)out.mutable_data_ptr(), s, on);
  });
  check_launch("apply");
  return out;
}

inline Tensor backward_sums(const Tensor& grad, const Tensor& y, const Tensor& scale, const Tensor& shift,
                            const Tensor& mean, const Tensor& rstd, bool silu) {
  check_like(grad, "grad", y, "y");
  const Shape s = check_nhwc(y, "y");
  const Normalization norm{check_floats(scale, "scale", s.c), check_floats(shift, "shift", s.c),
                           check_floats(mean, "mean", s.c), check_floats(rstd, "rstd", s.c)};
  const int sums = silu ? 5 : 2;
  Tensor out = empty_floats(y, {sums, s.n, s.c});
  dispatch(y, "y", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Launch on = launch_over(y, {&grad, &y});
    const Tensor partials = empty_floats(y, {pixel_partials(s, sums, on)});
    Passes<T>::backward_sums(data<T>(grad), data<T>(y), norm, silu, floats(out), s, floats(partials), on);
  });
  check_launch("backward_sums");
  return out;
}

inline Tensor backward_apply(const Tensor& grad, const Tensor& y, const Tensor& scale, const Tensor& shift,
                             const Tensor& mean, bool silu, const OptionalTensor& gate,
                             const OptionalTensor& pooled_grad, const Tensor& a, const Tensor& b) {
  check_like(grad, "grad", y, "y");
  const Shape s = check_nhwc(y, "y");
  const OutputGrad op{check_floats(scale, "scale", s.c),
                      check_floats(shift, "shift", s.c),
                      check_floats(mean, "mean", s.c),
                      check_floats(a, "a", s.c),
                      check_floats(b, "b", s.c),
                      check_floats(gate, "gate", s.c, s.n),
                      check_floats(pooled_grad, "pooled_grad", s.c, s.n),
                      silu};
  Tensor out = empty_nhwc(y, s.n, s.c, s.h, s.w);
  dispatch(y, "y", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Launch on = launch_over(y, {&grad, &y, &out});
    Passes<T>::backward_apply(data<T>(grad), data<T>(y), op, (T*)out.mutable_data_ptr(), s, on);
  });
  check_launch("backward_apply");
  return out;
}

inline InputAffine check_affine(const OptionalTensor& scale, const char* scale_name, const OptionalTensor& shift,
                                const char* shift_name, const Shape& s) {
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), shift_name, ": must be given with ", scale_name,
                  ", and only with it");
  return {check_floats(scale, scale_name, s.c), check_floats(shift, shift_name, s.c)};
}

inline std::tuple<Tensor, Tensor, Tensor> dwconv_stats(const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
                                                       const OptionalTensor& shift, int64_t stride, bool same) {
  const Shape s = check_nhwc(x, "x");
  const Window w = make_window(s, weight, stride, same);
  const Tensor taps = float_weight(weight);
  const InputAffine input = check_affine(scale, "scale", shift, "shift", s);
  Tensor y = empty_nhwc(x, s.n, s.c, w.out_h, w.out_w), mean = empty_floats(x, {s.c}), m2 = empty_floats(x, {s.c});
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Launch on = launch_over(x, {&x});
    const Tensor partials = empty_floats(x, {dwconv_stats_partials(s, w, on)});
    Passes<T>::dwconv_stats(data<T>(x), data<float>(taps), input, (T*)y.mutable_data_ptr(), floats(mean), floats(m2), s, w,
                            floats(partials), on);
  });
  check_launch("dwconv_stats");
  return {y, mean, m2};
}

inline std::tuple<Tensor, Tensor> dwconv_affine(const Tensor& x, const Tensor& weight, const OptionalTensor& in_scale,
                                                const OptionalTensor& in_shift, const Tensor& scale, const Tensor& shift,
                                                int64_t stride, bool same) {
  const Shape s = check_nhwc(x, "x");
  const Window w = make_window(s, weight, stride, same);
  const Tensor taps = float_weight(weight);
  const float *sc = check_floats(scale, "scale", s.c), *sh = check_floats(shift, "shift", s.c);
  const InputAffine input = check_affine(in_scale, "in_scale", in_shift, "in_shift", s);
  Tensor z = empty_nhwc(x, s.n, s.c, w.out_h, w.out_w), pooled = empty_floats(x, {s.n, s.c});
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Launch on = launch_over(x, {&x});
    const Tensor partials = empty_floats(x, {dwconv_affine_partials(s, w, on)});
    Passes<T>::dwconv_affine(data<T>(x), data<float>(taps), input, sc, sh, (T*)z.mutable_data_ptr(), floats(pooled), s, w,
                             floats(partials), on);
  });
  check_launch("dwconv_affine");
  return {z, pooled};
}

inline std::tuple<Tensor, Tensor, Tensor> backward_dwconv(
    const Tensor& grad, const OptionalTensor& y, const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
    const OptionalTensor& shift, const OptionalTensor& mean, const OptionalTensor& gate,
    const OptionalTensor& pooled_grad, const OptionalTensor& a, const OptionalTensor& b, const OptionalTensor& in_scale,
    const OptionalTensor& in_shift, const OptionalTensor& in_mean, const OptionalTensor& in_rstd, int64_t stride,
    bool same) {
  const Shape s = check_nhwc(x, "x");
  const Window w = make_window(s, weight, stride, same);
  const Tensor taps = float_weight(weight);
  const Shape out = check_nhwc(grad, "grad");
  STD_TORCH_CHECK(out.n == s.n && out.c == s.c && out.h == w.out_h && out.w == w.out_w,
                  "grad: must have the shape of the convolution's output");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad: must have the dtype of x");
  if (y) check_like(*y, "y", grad, "grad");
  const OutputGrad op{check_floats(scale, "scale", s.c),
                      check_floats(shift, "shift", s.c),
                      check_floats(mean, "mean", s.c),
                      check_floats(a, "a", s.c),
                      check_floats(b, "b", s.c),
                      check_floats(gate, "gate", s.c, s.n),
                      check_floats(pooled_grad, "pooled_grad", s.c, s.n),
                      true};
  STD_TORCH_CHECK(!op.scale || (y && op.shift && op.mean && op.a && op.b), "scale: needs y, shift, mean, a and b as well");
  const Normalization norm{check_floats(in_scale, "in_scale", s.c), check_floats(in_shift, "in_shift", s.c),
                       check_floats(in_mean, "in_mean", s.c), check_floats(in_rstd, "in_rstd", s.c)};
  STD_TORCH_CHECK(!norm.scale || (norm.shift && norm.mean && norm.rstd),
                  "in_scale: needs in_shift, in_mean and in_rstd as well");
  Tensor dx = empty_nhwc(x, s.n, s.c, s.h, s.w), dweight = empty_floats(x, {s.c, 1, w.kernel, w.kernel});
  Tensor sums = empty_floats(x, {2, s.c});
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Launch on = launch_over(x, {&grad, or_else(y, grad)});
    const Tensor partials = empty_floats(x, {backward_dwconv_partials(s, w, on)});
    Passes<T>::backward_dwconv(data<T>(grad), data<T>(y), data<T>(x), data<float>(taps), op, norm, (T*)dx.mutable_data_ptr(),
                               floats(dweight), floats(sums), s, w, floats(partials), on);
  });
  check_launch("backward_dwconv");
  return {dx, dweight, sums};
}

// Weights of any storage type as fp32.
inline Tensor as_floats(const Tensor& weight, const char* name) {
  check_device(weight, name);
  STD_TORCH_CHECK(weight.is_contiguous(), name, ": must be contiguous");
  return torch::stable::to(weight, ScalarType::Float);
}

inline Tensor batch_norm_stats(const Tensor& mean, const Tensor& m2, const Tensor& weight, const Tensor& bias,
                               double eps, int64_t count) {
  const int64_t channels = mean.numel();
  const float *mu = check_floats(mean, "mean", channels), *squares = check_floats(m2, "m2", channels);
  const Tensor gamma = as_floats(weight, "weight"), beta = as_floats(bias, "bias");
  STD_TORCH_CHECK(weight.numel() == channels && bias.numel() == channels, "weight: must be for ", channels,
                  " channels");
  Tensor stats = empty_floats(mean, {5, channels});
  on_device(mean, [&](const Launch& on) {
    Algebra::batch_norm_stats(mu, squares, data<float>(gamma), data<float>(beta), (float)eps, count, (int)channels,
                              floats(stats), on);
  });
  check_launch("batch_norm_stats");
  return stats;
}

inline Tensor batch_norm_grad(const Tensor& stats, const Tensor& sums, const OptionalTensor& gate,
                              const OptionalTensor& pooled_grad, int64_t count) {
  STD_TORCH_CHECK(sums.dim() == 3 && (sums.size(0) == 2 || sums.size(0) == 5), "sums: must be [2, N, C] or [5, N, C]");
  const int64_t kinds = sums.size(0), images = sums.size(1), channels = sums.size(2);
  const float* norm = check_floats(stats, "stats", channels, 5);
  const float* all = check_floats(sums, "sums", channels, kinds * images);
  const float* factor = check_floats(gate, "gate", channels, images);
  const float* pooled = check_floats(pooled_grad, "pooled_grad", channels, images);
  STD_TORCH_CHECK(!pooled || kinds == 5, "pooled_grad: needs the five sums");
  Tensor grads = empty_floats(sums, {4, channels});
  on_device(sums, [&](const Launch& on) {
    Algebra::batch_norm_grad(norm, all, (int)kinds, factor, pooled, count, images, (int)channels, floats(grads), on);
  });
  check_launch("batch_norm_grad");
  return grads;
}

// The MLP's weights, checked, and as fp32 tensors that the pointers are of.
struct SqueezeTensors {
  Tensor reduce, reduce_bias, expand, expand_bias;
  int64_t channels, squeezed;

  SqueezeTensors(const Tensor& w_reduce, const Tensor& b_reduce, const Tensor& w_expand, const Tensor& b_expand,
                 int64_t channels)
      : reduce(as_floats(w_reduce, "w_reduce")), reduce_bias(as_floats(b_reduce, "b_reduce")),
        expand(as_floats(w_expand, "w_expand")), expand_bias(as_floats(b_expand, "b_expand")), channels(channels),
        squeezed(b_reduce.numel()) {
    STD_TORCH_CHECK(w_reduce.numel() == squeezed * channels, "w_reduce: must be [", squeezed, ", ", channels,
                    ", 1, 1]");
    STD_TORCH_CHECK(w_expand.numel() == squeezed * channels, "w_expand: must be [", channels, ", ", squeezed,
                    ", 1, 1]");
    STD_TORCH_CHECK(b_expand.numel() == channels, "b_expand: must be for ", channels, " channels");
  }
  SqueezeWeights weights() const {
    return {data<float>(reduce), data<float>(reduce_bias), data<float>(expand), data<float>(expand_bias), (int)channels,
            (int)squeezed};
  }
};

inline Tensor squeeze_gate(const Tensor& sums, int64_t pixels, const Tensor& w_reduce, const Tensor& b_reduce,
                           const Tensor& w_expand, const Tensor& b_expand, ScalarType) {
  STD_TORCH_CHECK(sums.dim() == 2, "sums: must be [N, C]");
  const int64_t images = sums.size(0), channels = sums.size(1);
  const float* pooled = check_floats(sums, "sums", channels, images);
  const SqueezeTensors mlp(w_reduce, b_reduce, w_expand, b_expand, channels);
  Tensor squeeze = empty_floats(sums, {2, images, channels});
  const Tensor hidden = empty_floats(sums, {images, mlp.squeezed});
  on_device(sums, [&](const Launch& on) {
    Algebra::squeeze_gate(pooled, pixels, mlp.weights(), images, floats(squeeze), floats(hidden), on);
  });
  check_launch("squeeze_gate");
  return squeeze;
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> squeeze_gate_grad(
    const Tensor& squeeze, const Tensor& dgate, int64_t pixels, const Tensor& w_reduce, const Tensor& b_reduce,
    const Tensor& w_expand, const Tensor& b_expand, ScalarType) {
  STD_TORCH_CHECK(squeeze.dim() == 3 && squeeze.size(0) == 2, "squeeze: must be [2, N, C]");
  const int64_t images = squeeze.size(1), channels = squeeze.size(2);
  const float* means = check_floats(squeeze, "squeeze", channels, 2 * images);
  const float* outer = check_floats(dgate, "dgate", channels, images);
  const SqueezeTensors mlp(w_reduce, b_reduce, w_expand, b_expand, channels);
  Tensor pooled_grad = empty_floats(squeeze, {images, channels});
  Tensor dw_reduce = empty_floats(squeeze, w_reduce.sizes()), db_reduce = empty_floats(squeeze, {mlp.squeezed});
  Tensor dw_expand = empty_floats(squeeze, w_expand.sizes()), db_expand = empty_floats(squeeze, {channels});
  const Tensor partials = empty_floats(squeeze, {2, images, mlp.squeezed});
  const SqueezeGrads grads{floats(dw_reduce), floats(db_reduce), floats(dw_expand), floats(db_expand)};
  on_device(squeeze, [&](const Launch& on) {
    Algebra::squeeze_gate_grad(means, outer, pixels, mlp.weights(), images, floats(pooled_grad), grads,
                               floats(partials), on);
  });
  check_launch("squeeze_gate_grad");
  return {pooled_grad, dw_reduce, db_reduce, dw_expand, db_expand};
}

}  // namespace effnet_fast

// In the block of STABLE_TORCH_LIBRARY_IMPL.
#define EFFNET_FAST_REGISTER_PASSES(m)                                   \
  m.impl("channel_stats", TORCH_BOX(&effnet_fast::channel_stats));       \
  m.impl("dwconv_stats", TORCH_BOX(&effnet_fast::dwconv_stats));         \
  m.impl("pool", TORCH_BOX(&effnet_fast::pool));                         \
  m.impl("apply", TORCH_BOX(&effnet_fast::apply));                       \
  m.impl("backward_sums", TORCH_BOX(&effnet_fast::backward_sums));       \
  m.impl("backward_dwconv", TORCH_BOX(&effnet_fast::backward_dwconv));   \
  m.impl("backward_apply", TORCH_BOX(&effnet_fast::backward_apply));     \
  m.impl("dwconv_affine", TORCH_BOX(&effnet_fast::dwconv_affine));       \
  m.impl("batch_norm_stats", TORCH_BOX(&effnet_fast::batch_norm_stats)); \
  m.impl("batch_norm_grad", TORCH_BOX(&effnet_fast::batch_norm_grad));   \
  m.impl("squeeze_gate", TORCH_BOX(&effnet_fast::squeeze_gate));         \
  m.impl("squeeze_gate_grad", TORCH_BOX(&effnet_fast::squeeze_gate_grad))
