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

}  // namespace effnet_fast

// In the block of STABLE_TORCH_LIBRARY_IMPL.
#define EFFNET_FAST_REGISTER_PASSES(m)                              \
  m.impl("channel_stats", TORCH_BOX(&effnet_fast::channel_stats));     \
  m.impl("dwconv_stats", TORCH_BOX(&effnet_fast::dwconv_stats));       \
  m.impl("pool", TORCH_BOX(&effnet_fast::pool));                       \
  m.impl("apply", TORCH_BOX(&effnet_fast::apply));                     \
  m.impl("backward_sums", TORCH_BOX(&effnet_fast::backward_sums));     \
  m.impl("backward_dwconv", TORCH_BOX(&effnet_fast::backward_dwconv)); \
  m.impl("backward_apply", TORCH_BOX(&effnet_fast::backward_apply));   \
  m.impl("dwconv_affine", TORCH_BOX(&effnet_fast::dwconv_affine))
