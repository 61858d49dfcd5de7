// The gradient of a convolution's output y, formed on load where a BatchNorm (+ SiLU) (+ gate) follows.
#pragma once

#include "tensors.h"

namespace effnet_fast {

// du * scale + (y - mean) * b + a with du = (grad * gate + pooled_grad) * SiLU'(y * scale + shift), or without the
// SiLU'; just grad when scale is null.
struct OutputGrad {
  const float *scale, *shift, *mean, *a, *b;  // [C]
  const float *gate, *pooled_grad;            // [N, C] or null
  bool silu;

  OutputGrad(const OptionalTensor& scale_, const OptionalTensor& shift_, const OptionalTensor& mean_,
             const OptionalTensor& gate_, const OptionalTensor& pooled_grad_, const OptionalTensor& a_,
             const OptionalTensor& b_, bool silu_, bool has_y, const Shape& s)
      : scale(check_floats(scale_, "scale", s.c)), shift(check_floats(shift_, "shift", s.c)),
        mean(check_floats(mean_, "mean", s.c)), a(check_floats(a_, "a", s.c)), b(check_floats(b_, "b", s.c)),
        gate(check_floats(gate_, "gate", s.c, s.n)), pooled_grad(check_floats(pooled_grad_, "pooled_grad", s.c, s.n)),
        silu(silu_) {
    STD_TORCH_CHECK(!scale || (has_y && shift && mean && a && b), "scale: needs y, shift, mean, a and b as well");
  }

  // For the channels from c on of image n: the function of (grad, y) that gives the gradient. T: the storage type.
  template <class T, class Lanes>
  auto of(int64_t n, int64_t channels, int64_t c, Lanes lanes) const {
    const Vec factor = gate ? load(gate + n * channels + c, lanes) : broadcast(1.f);
    const Vec pooled = pooled_grad ? load(pooled_grad + n * channels + c, lanes) : Vec{};
    return [=, silu = silu, scale = load(scale + c, lanes), shift = load(shift + c, lanes),
            mean = load(mean + c, lanes), a = load(a + c, lanes), b = load(b + c, lanes)](Vec grad, Vec y) {
      Vec du = grad * factor + pooled;
      if (silu) {
        const Vec u = y * scale + shift, s = sigmoid<T>(u);
        du *= silu_slope(s, u * s);
      }
      return du * scale + (y - mean) * b + a;
    };
  }
};

}  // namespace effnet_fast
