// BatchNorm between the passes, on [C] and [N, C]: a fifth of what PyTorch's operators, some ten a time, take for it.
#pragma once

#include <cmath>

#include "tensors.h"

namespace effnet_fast {

Tensor batch_norm_stats(const Tensor& mean, const Tensor& m2, const Tensor& weight, const Tensor& bias, double eps,
                        int64_t count) {
  const int64_t channels = mean.numel();
  const float *mu = check_floats(mean, "mean", channels), *squares = check_floats(m2, "m2", channels);
  const FloatWeights gamma = as_floats(weight, "weight"), beta = as_floats(bias, "bias");
  STD_TORCH_CHECK(weight.numel() == channels && bias.numel() == channels, "weight: must be for ", channels, " channels");
  Tensor stats = empty_floats({5, channels});
  float* out = floats(stats);
  const float biased = 1.f / (float)std::max<int64_t>(count, 1), unbiased = 1.f / (float)std::max<int64_t>(count - 1, 1);
  for (int64_t c = 0; c < channels; ++c) {
    const float rstd = 1.f / std::sqrt(squares[c] * biased + (float)eps), scale = gamma.data[c] * rstd;
    out[c] = scale;
    out[channels + c] = beta.data[c] - mu[c] * scale;
    out[2 * channels + c] = mu[c];
    out[3 * channels + c] = rstd;
    out[4 * channels + c] = squares[c] * unbiased;
  }
  return stats;
}

Tensor batch_norm_grad(const Tensor& stats, const Tensor& sums, const OptionalTensor& gate,
                       const OptionalTensor& pooled_grad, int64_t count) {
  STD_TORCH_CHECK(sums.dim() == 3 && (sums.size(0) == 2 || sums.size(0) == 5), "sums: must be [2, N, C] or [5, N, C]");
  const int64_t kinds = sums.size(0), images = sums.size(1), channels = sums.size(2);
  const float *norm = check_floats(stats, "stats", channels, 5), *all = check_floats(sums, "sums", channels, kinds * images);
  const float* factor = check_floats(gate, "gate", channels, images);
  const float* pooled = check_floats(pooled_grad, "pooled_grad", channels, images);
  STD_TORCH_CHECK(!pooled || kinds == 5, "pooled_grad: needs the five sums");
  const float *du = all + (kinds == 5) * images * channels, *du_hat = du + (kinds == 5 ? 2 : 1) * images * channels;
  const float *slope = du + images * channels, *slope_hat = du_hat + images * channels;  // of the five
  Tensor grads = empty_floats({4, channels});
  float* out = floats(grads);
  torch::stable::parallel_for(0, (channels + kLanes - 1) / kLanes, 1 + (1 << 14) / (images * kinds + 1) / kLanes,
                              [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v)
      with_lanes(v, channels, [&](auto lanes) {
        const int64_t c = v * kLanes;
        Vec sum = {}, sum_hat = {};
        for (int64_t n = 0; n < images; ++n) {
          const int64_t at = n * channels + c;
          Vec mine = load(du + at, lanes), mine_hat = load(du_hat + at, lanes);
          if (factor) {
            const Vec f = load(factor + at, lanes);
            mine *= f;
            mine_hat *= f;
          }
          if (pooled) {
            const Vec p = load(pooled + at, lanes);
            mine += p * load(slope + at, lanes);
            mine_hat += p * load(slope_hat + at, lanes);
          }
          sum += mine;
          sum_hat += mine_hat;
        }
        const Vec scale = load(norm + c, lanes), rstd = load(norm + 3 * channels + c, lanes);
        store(out + c, sum_hat, lanes);
        store(out + channels + c, sum, lanes);
        store(out + 2 * channels + c, -scale * (sum / (float)count), lanes);
        store(out + 3 * channels + c, -scale * rstd * (sum_hat / (float)count), lanes);
      });
  });
  return grads;
}

}  // namespace effnet_fast
