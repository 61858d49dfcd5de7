// RMSprop's step in one pass over the weights. PyTorch has none for CPUs, and makes eight, a fifth of a training step at
// 32 px.
#pragma once

#include <cmath>

#include "tensors.h"

namespace effnet_fast {

// Element by element: what lies at one place in memory belongs together, in whatever order of dimensions.
inline void check_lies_as(const Tensor& t, const char* name, const Tensor& weight) {
  check_on_cpu(t, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, ": must be float32");
  STD_TORCH_CHECK(t.dim() == weight.dim(), name, ": must have the shapes of weights");
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) {
    STD_TORCH_CHECK(t.size(d) == weight.size(d), name, ": must have the shapes of weights");
    STD_TORCH_CHECK(t.size(d) == 1 || t.stride(d) == weight.stride(d), name, ": must have the strides of weights");
    last += (t.size(d) - 1) * t.stride(d);
  }
  STD_TORCH_CHECK(t.numel() == 0 || last == t.numel() - 1, name, ": must lie without gaps");
}

// What is a reference could lie among the weights, and would keep the loop from being vectorized.
struct RMSprop {
  float lr, alpha, momentum, eps, weight_decay;
  void step(float* __restrict weight, const float* __restrict grad, float* __restrict square,
            float* __restrict velocity, int64_t count) const {
    const auto [lr, alpha, momentum, eps, weight_decay] = *this;
    for (int64_t i = 0; i < count; ++i) {
      const float g = grad[i] + weight_decay * weight[i];
      square[i] = alpha * square[i] + (1 - alpha) * g * g;
      velocity[i] = momentum * velocity[i] + g / (std::sqrt(square[i]) + eps);
      weight[i] -= lr * velocity[i];
    }
  }
};

void rmsprop_step(std::vector<Tensor> weights, std::vector<Tensor> grads, std::vector<Tensor> squares,
                  std::vector<Tensor> velocities, double lr, double alpha, double momentum, double eps,
                  double weight_decay) {
  const size_t tensors = weights.size();
  STD_TORCH_CHECK(grads.size() == tensors && squares.size() == tensors && velocities.size() == tensors,
                  "grads, squares, velocities: must be as many as weights");
  struct Part {
    size_t tensor;
    int64_t first, count;
  };
  std::vector<Part> parts;
  for (size_t i = 0; i < tensors; ++i) {
    check_lies_as(weights[i], "weights", weights[i]);
    check_lies_as(grads[i], "grads", weights[i]);
    check_lies_as(squares[i], "squares", weights[i]);
    check_lies_as(velocities[i], "velocities", weights[i]);
    constexpr int64_t kPart = 1 << 14;
    const int64_t count = weights[i].numel();
    for (int64_t at = 0; at < count; at += kPart) parts.push_back({i, at, std::min(kPart, count - at)});
  }
  const RMSprop rule{(float)lr, (float)alpha, (float)momentum, (float)eps, (float)weight_decay};
  for_each_task((int64_t)parts.size(), [&](int64_t task) {
    const auto [i, first, count] = parts[task];
    rule.step(floats(weights[i]) + first, (const float*)grads[i].const_data_ptr() + first, floats(squares[i]) + first,
              floats(velocities[i]) + first, count);
  });
}

}  // namespace effnet_fast
