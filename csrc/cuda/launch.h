// The passes on a GPU, on raw pointers. Each is compiled for float, __nv_bfloat16 and __half in a file of its own; what
// is in fp32 always, once, in algebra.cu.
// Nothing here allocates, synchronizes or reads back: partial results go to `partials`, whose size the functions below
// give, and every launch goes to the given stream.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "operands.h"
#include "plans.h"

namespace effnet_fast {

struct Launch {
  cudaStream_t stream;
  int vector;  // channels a thread moves at once: 16 bytes, or 1
  int multiprocessors;
};

inline int64_t channel_stats_partials(const Shape& s, const Launch& on) {
  return (int64_t)PixelPlan(s.as_one_image(), on.vector, on.multiprocessors).chunks * 4 * s.c;
}
// of `sums` sums per image and channel; none where one block makes them
inline int64_t pixel_partials(const Shape& s, int sums, const Launch& on) {
  const int chunks = PixelPlan(s, on.vector, on.multiprocessors).chunks;
  return chunks > 1 ? (int64_t)chunks * sums * s.n * s.c : 0;
}
inline int64_t dwconv_stats_partials(const Shape& s, const Window& w, const Launch& on) {
  return (int64_t)forward_plan(s, w, on.vector, on.multiprocessors).parts * 4 * s.c;
}
inline int64_t dwconv_affine_partials(const Shape& s, const Window& w, const Launch& on) {
  return (int64_t)forward_plan(s, w, on.vector, on.multiprocessors).tiles * s.c;
}
inline int64_t backward_dwconv_partials(const Shape& s, const Window& w, const Launch& on) {
  return (int64_t)backward_plan(s, w, on.vector, on.multiprocessors).parts * (w.kernel * w.kernel + 2) * s.c;
}

template <class T>
struct Passes {
  static void channel_stats(const T* x, float* mean, float* m2, const Shape& s, float* partials, const Launch& on);
  static void pool(const T* y, const float* scale, const float* shift, bool silu, float* out, const Shape& s,
                   float* partials, const Launch& on);
  static void apply(const T* y, const ApplyOperands& op, const T* residual, T* out, const Shape& s, const Launch& on);
  // out [5, N, C] with SiLU, else [2, N, C]
  static void backward_sums(const T* grad, const T* y, const Normalization& norm, bool silu, float* out, const Shape& s,
                            float* partials, const Launch& on);
  static void backward_apply(const T* grad, const T* y, const OutputGrad& op, T* out, const Shape& s, const Launch& on);
  static void dwconv_stats(const T* x, const float* weight, const InputAffine& input, T* y, float* mean, float* m2,
                           const Shape& s, const Window& w, float* partials, const Launch& on);
  static void dwconv_affine(const T* x, const float* weight, const InputAffine& input, const float* scale,
                            const float* shift, T* z, float* pooled, const Shape& s, const Window& w, float* partials,
                            const Launch& on);
  // y: may be null where op.scale is. sums [2, C].
  static void backward_dwconv(const T* grad, const T* y, const T* x, const float* weight, const OutputGrad& op,
                              const Normalization& norm, T* dx, float* dweight, float* sums, const Shape& s, const Window& w,
                              float* partials, const Launch& on);
};

// The algebra between the passes; shapes as in passes/schema.py.
struct Algebra {
  static void batch_norm_stats(const float* mean, const float* m2, const float* weight, const float* bias, float eps,
                               int64_t count, int channels, float* stats, const Launch& on);
  // sums [kinds, N, C]
  static void batch_norm_grad(const float* stats, const float* sums, int kinds, const float* gate,
                              const float* pooled_grad, int64_t count, int64_t images, int channels, float* grads,
                              const Launch& on);
  // hidden [N, squeezed]
  static void squeeze_gate(const float* sums, int64_t pixels, const SqueezeWeights& mlp, int64_t images, float* squeeze,
                           float* hidden, const Launch& on);
  // partials [2, N, squeezed]
  static void squeeze_gate_grad(const float* squeeze, const float* dgate, int64_t pixels, const SqueezeWeights& mlp,
                                int64_t images, float* pooled_grad, const SqueezeGrads& grads, float* partials,
                                const Launch& on);
};

// out: sums of partials [parts, rows, columns] over parts, transposed if asked for.
void sum_parts(const float* partials, int64_t parts, int64_t rows, int64_t columns, bool transpose, float* out,
               const Launch& on);
// of partials [parts, 4, channels], as channel_stats_kernel has them
void merge_moments(const float* partials, int64_t parts, int channels, float* mean, float* m2, const Launch& on);

}  // namespace effnet_fast
