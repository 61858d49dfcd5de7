// The launchers of launch.h. A file for one storage type includes this and instantiates Passes.
#pragma once

#include "depthwise.cuh"
#include "depthwise_backward.cuh"
#include "launch.h"
#include "pointwise.cuh"

namespace effnet_fast {

// Calls f.template operator()<V>() with the channels of a vector.
template <class T, class F>
void with_vector(const Launch& on, const F& f) {
  on.vector == 1 ? f.template operator()<1>() : f.template operator()<16 / sizeof(T)>();
}

// Calls f.template operator()<K, S>().
template <class F>
void with_window(const Window& w, const F& f) {
  if (w.kernel == 3) return w.stride == 1 ? f.template operator()<3, 1>() : f.template operator()<3, 2>();
  if (w.kernel == 5) return w.stride == 1 ? f.template operator()<5, 1>() : f.template operator()<5, 2>();
  return w.stride == 1 ? f.template operator()<7, 1>() : f.template operator()<7, 2>();
}

// Lets a kernel have more than the 48 KB of shared memory that every kernel has.
template <class Kernel>
void allow_shared(Kernel* kernel, int bytes) {
#ifndef EFFNET_FAST_SIMULATED
  if (bytes > 48 << 10) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
#endif
}

template <class T>
void Passes<T>::channel_stats(const T* x, float* mean, float* m2, const Shape& s, float* partials, const Launch& on) {
  const Shape all = s.as_one_image();
  const PixelPlan plan(all, on.vector, on.multiprocessors);
  with_vector<T>(on, [&]<int V>() {
    const auto kernel = channel_stats_kernel<T, V>;
    const int shared_bytes = (plan.rows + 1) * plan.lanes * V * (int)sizeof(float);
    if (plan.blocks > 0)
      EFFNET_FAST_LAUNCH(kernel, plan.blocks, PixelPlan::kThreads, shared_bytes, on.stream, x, partials, all, plan);
  });
  merge_moments(partials, plan.chunks, s.c, mean, m2, on);
}

template <class T>
void Passes<T>::pool(const T* y, const float* scale, const float* shift, bool silu, float* out, const Shape& s,
                     float* partials, const Launch& on) {
  const PixelPlan plan(s, on.vector, on.multiprocessors);
  with_vector<T>(on, [&]<int V>() {
    const auto kernel = pool_kernel<T, V>;
    const int shared_bytes = plan.rows * plan.lanes * V * (int)sizeof(float);
    if (plan.blocks > 0)
      EFFNET_FAST_LAUNCH(kernel, plan.blocks, PixelPlan::kThreads, shared_bytes, on.stream, y, scale, shift, silu,
                         plan.chunks > 1 ? partials : out, s, plan);
  });
  if (plan.chunks > 1) sum_parts(partials, plan.chunks, s.n, s.c, false, out, on);
}

template <class T>
void Passes<T>::apply(const T* y, const ApplyOperands& op, const T* residual, T* out, const Shape& s, const Launch& on) {
  const PixelPlan plan(s, on.vector, on.multiprocessors);
  with_vector<T>(on, [&]<int V>() {
    const auto kernel = apply_kernel<T, V>;
    if (plan.blocks > 0)
      EFFNET_FAST_LAUNCH(kernel, plan.blocks, PixelPlan::kThreads, 0, on.stream, y, residual, out, op, s, plan);
  });
}

template <class T>
void Passes<T>::backward_sums(const T* grad, const T* y, const Normalization& norm, bool silu, float* out, const Shape& s,
                              float* partials, const Launch& on) {
  const PixelPlan plan(s, on.vector, on.multiprocessors);
  with_vector<T>(on, [&]<int V>() {
    const auto kernel = silu ? backward_sums_kernel<T, V, true> : backward_sums_kernel<T, V, false>;
    const int shared_bytes = (silu ? 5 : 2) * plan.rows * plan.lanes * V * (int)sizeof(float);
    if (plan.blocks > 0)
      EFFNET_FAST_LAUNCH(kernel, plan.blocks, PixelPlan::kThreads, shared_bytes, on.stream, grad, y, norm,
                         plan.chunks > 1 ? partials : out, s, plan);
  });
  if (plan.chunks > 1) sum_parts(partials, plan.chunks, silu ? 5 : 2, s.n * s.c, false, out, on);
}

template <class T>
void Passes<T>::backward_apply(const T* grad, const T* y, const OutputGrad& op, T* out, const Shape& s,
                               const Launch& on) {
  const PixelPlan plan(s, on.vector, on.multiprocessors);
  with_vector<T>(on, [&]<int V>() {
    const auto kernel = op.silu ? backward_apply_kernel<T, V, true> : backward_apply_kernel<T, V, false>;
    if (plan.blocks > 0)
      EFFNET_FAST_LAUNCH(kernel, plan.blocks, PixelPlan::kThreads, 0, on.stream, grad, y, out, op, s, plan);
  });
}

template <class T, int K, int S, int V, class Sink>
void launch_depthwise(const T* x, const float* weight, const InputAffine& input, const Sink& sink, const Shape& s,
                      const Window& w, const DepthwisePlan& plan, const Launch& on) {
  const auto kernel = depthwise_kernel<T, K, S, V, Sink>;
  const ForwardShape shape(plan, K, S, sizeof(T));
  if (plan.tiles > 0)
    EFFNET_FAST_LAUNCH(kernel, (int64_t)plan.parts * plan.groups, plan.threads, shape.bytes, on.stream, x, weight, input,
                       sink, s, w, plan, shape);
}

template <class T>
void Passes<T>::dwconv_stats(const T* x, const float* weight, const InputAffine& input, T* y, float* mean, float* m2,
                             const Shape& s, const Window& w, float* partials, const Launch& on) {
  const DepthwisePlan plan = forward_plan(s, w, on.vector, on.multiprocessors);
  with_vector<T>(on, [&]<int V>() {
    with_window(w, [&]<int K, int S>() {
      launch_depthwise<T, K, S, V>(x, weight, input, StatisticsSink<T>{y, partials}, s, w, plan, on);
    });
  });
  merge_moments(partials, plan.parts, s.c, mean, m2, on);
}

template <class T>
void Passes<T>::dwconv_affine(const T* x, const float* weight, const InputAffine& input, const float* scale,
                              const float* shift, T* z, float* pooled, const Shape& s, const Window& w, float* partials,
                              const Launch& on) {
  DepthwisePlan plan = forward_plan(s, w, on.vector, on.multiprocessors);
  plan.parts = plan.tiles;  // the sums are per image
  with_vector<T>(on, [&]<int V>() {
    with_window(w, [&]<int K, int S>() {
      launch_depthwise<T, K, S, V>(x, weight, input, AffineSink<T>{z, scale, shift, partials}, s, w, plan, on);
    });
  });
  sum_parts(partials, plan.strips * plan.segments, s.n, s.c, false, pooled, on);
}

template <class T>
void Passes<T>::backward_dwconv(const T* grad, const T* y, const T* x, const float* weight, const OutputGrad& op,
                                const Normalization& norm, T* dx, float* dweight, float* sums, const Shape& s,
                                const Window& w, float* partials, const Launch& on) {
  const DepthwisePlan plan = backward_plan(s, w, on.vector, on.multiprocessors);
  const int taps = w.kernel * w.kernel;
  float* sum_partials = partials + (int64_t)plan.parts * taps * s.c;
  with_vector<T>(on, [&]<int V>() {
    with_window(w, [&]<int K, int S>() {
      const auto kernel = depthwise_backward_kernel<T, K, S, V>;
      const BackwardShape shape(plan, K, S, sizeof(T));
      if (plan.tiles == 0) return;
      allow_shared(kernel, shape.bytes);
      EFFNET_FAST_LAUNCH(kernel, (int64_t)plan.parts * plan.groups, plan.threads, shape.bytes, on.stream, grad, y, x, weight,
                         op, norm, dx, partials, sum_partials, s, w, plan, shape);
    });
  });
  sum_parts(partials, plan.parts, taps, s.c, true, dweight, on);
  sum_parts(sum_partials, plan.parts, 2, s.c, false, sums, on);
}

}  // namespace effnet_fast
