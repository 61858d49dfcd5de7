// Tensors as the kernels see them: checked once at the door, then plain pointers and sizes.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "simd.h"

namespace effnet_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A 4-d tensor that lies channels_last (NHWC) in memory.
struct Shape {
  int64_t n, c, h, w;
  int64_t pixels() const { return h * w; }
  int64_t vectors() const { return (c + kLanes - 1) / kLanes; }
};

inline void check_on_cpu(const Tensor& t, const char* name) { STD_TORCH_CHECK(t.is_cpu(), name, ": must be on the CPU"); }

// channels: of which the tensor's must be a multiple.
inline Shape check_nhwc(const Tensor& t, const char* name, int64_t channels = 8) {
  check_on_cpu(t, name);
  STD_TORCH_CHECK(t.dim() == 4, name, ": got ", t.dim(), " dimensions, must be 4 (N, C, H, W)");
  const Shape s{t.size(0), t.size(1), t.size(2), t.size(3)};
  STD_TORCH_CHECK(s.h > 0 && s.w > 0, name, ": must have pixels");
  STD_TORCH_CHECK(s.c % channels == 0, name, ": got ", s.c, " channels, must be a multiple of ", channels);
  // strides of dimensions of size 1 carry no meaning, and those of an empty tensor none at all
  const int64_t strides[4] = {s.h * s.w * s.c, 1, s.w * s.c, s.c};
  for (int d = 0; d < 4 && t.numel() > 0; ++d)
    STD_TORCH_CHECK(t.size(d) == 1 || t.stride(d) == strides[d], name, ": must be contiguous in channels_last format");
  return s;
}

inline void check_like(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  const Shape a = check_nhwc(t, name), b = check_nhwc(other, other_name);
  STD_TORCH_CHECK(a.n == b.n && a.c == b.c && a.h == b.h && a.w == b.w, name, ": must have the shape of ", other_name);
  STD_TORCH_CHECK(t.scalar_type() == other.scalar_type(), name, ": must have the dtype of ", other_name);
}

// Small fp32 operands: [C], or [N, C] with rows = N.
inline const float* check_floats(const Tensor& t, const char* name, int64_t channels, int64_t rows = 1) {
  check_on_cpu(t, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, ": must be float32");
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == channels * rows &&
                      t.size(t.dim() - 1) == channels, name, ": must be contiguous with ", channels, " channels");
  return (const float*)t.const_data_ptr();
}
inline const float* check_floats(const OptionalTensor& t, const char* name, int64_t channels, int64_t rows = 1) {
  return t.has_value() ? check_floats(*t, name, channels, rows) : nullptr;
}

inline Tensor empty_nhwc(const Shape& s, ScalarType dtype) {
  return torch::stable::empty({s.n, s.c, s.h, s.w}, dtype, std::nullopt, std::nullopt, std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}
inline Tensor empty_floats(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return torch::stable::empty(sizes, ScalarType::Float);
}
inline float* floats(const Tensor& t) { return (float*)t.mutable_data_ptr(); }

// Calls f with a null pointer of the storage type.
template <class F>
inline void dispatch(const Tensor& t, const char* name, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f((float*)nullptr);
    case ScalarType::BFloat16: return f((BFloat16*)nullptr);
    case ScalarType::Half: return f((Float16*)nullptr);
    default: STD_TORCH_CHECK(false, name, ": dtype must be float32, bfloat16 or float16");
  }
}

// Weights of any storage type as floats: the tensor's own, or a copy.
struct FloatWeights {
  std::vector<float> copy;
  const float* data;
};

inline FloatWeights as_floats(const Tensor& weight, const char* name) {
  check_on_cpu(weight, name);
  for (int64_t d = weight.dim() - 1, stride = 1; d >= 0; stride *= weight.size(d--))
    STD_TORCH_CHECK(weight.size(d) <= 1 || weight.stride(d) == stride, name, ": must be contiguous");
  if (weight.scalar_type() == ScalarType::Float) return {{}, (const float*)weight.const_data_ptr()};
  std::vector<float> copy(weight.numel());
  dispatch(weight, name, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = (const T*)weight.const_data_ptr();
    const int64_t count = weight.numel(), whole = count / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) store(&copy[i], load(from + i));
    T rest[kLanes] = {};
    std::copy(from + whole, from + count, rest);
    float last[kLanes];
    store(last, load(rest));
    std::copy(last, last + (count - whole), copy.begin() + whole);
  });
  const float* data = copy.data();
  return {std::move(copy), data};
}

// Runs f(task) for every task, spread over torch's threads.
template <class F>
inline void for_each_task(int64_t tasks, const F& f) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) f(task);
  });
}

// Aligned floats that a thread keeps from call to call, so that scratch costs no page faults. In huge pages, as products
// and rings walk it with large strides (Zen 5, B0, a training step: 1.6 % less at 224 px in bf16 and in fp32, 1 % at 64 px).
inline float* scratch(size_t count) {
  constexpr size_t kHugePage = 2 << 20;
  static thread_local std::unique_ptr<float, decltype(&std::free)> buffer(nullptr, &std::free);
  static thread_local size_t size = 0;
  const size_t needed = (count * sizeof(float) / kHugePage + 1) * kHugePage;
  if (size < needed) {
    size = 0;
    buffer.reset();
    buffer.reset((float*)std::aligned_alloc(kHugePage, needed));
    if (!buffer) throw std::bad_alloc();
    size = needed;
#if defined(MADV_HUGEPAGE)
    madvise(buffer.get(), needed, MADV_HUGEPAGE);
#endif
  }
  return buffer.get();
}

// Partial statistics of disjoint sets of values of one channel, combined in a fixed order in double (Chan et al. 1983).
// means and m2s: [parts, channels]; count(part) values each.
template <class Mean, class Count>
inline void combine_moments(const Mean* means, const float* m2s, int64_t parts, int64_t channels, const Count& count,
                            float* mean, float* m2) {
  double total = 0;
  for (int64_t p = 0; p < parts; ++p) total += (double)count(p);
  torch::stable::parallel_for(0, channels, 256, [&](int64_t begin, int64_t end) {
    // part by part, so that memory is read in order
    std::vector<double> center(end - begin), square(end - begin);
    for (int64_t p = 0; p < parts; ++p)
      for (int64_t c = begin; c < end; ++c) center[c - begin] += (double)count(p) / total * means[p * channels + c];
    for (int64_t p = 0; p < parts; ++p)
      for (int64_t c = begin; c < end; ++c) {
        const double d = means[p * channels + c] - center[c - begin];
        square[c - begin] += m2s[p * channels + c] + (double)count(p) * d * d;
      }
    for (int64_t c = begin; c < end; ++c) {
      mean[c] = (float)center[c - begin];
      m2[c] = (float)square[c - begin];
    }
  });
}

}  // namespace effnet_fast
