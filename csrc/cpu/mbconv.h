// An MBConv block in one call, or in one each way: the passes and the algebra between them, as `ops.mbconv` and
// `ops.mbconv_folded` compose them. Python takes as long from pass to pass as a pass over a small map does.
#pragma once

#include "elementwise.h"
#include "normalization.h"
#include "sweeps.h"

namespace effnet_fast {

// The rows of batch_norm_stats.
struct Norm {
  Tensor scale, shift, mean, rstd;

  explicit Norm(const Tensor& stats)
      : scale(torch::stable::select(stats, 0, 0)), shift(torch::stable::select(stats, 0, 1)),
        mean(torch::stable::select(stats, 0, 2)), rstd(torch::stable::select(stats, 0, 3)) {}
};

inline int64_t values_per_channel(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

// A factor per image as a gate [N, C].
inline OptionalTensor branch_gate(const OptionalTensor& branch_scale, int64_t channels) {
  if (!branch_scale) return std::nullopt;
  const int64_t images = branch_scale->numel();
  const float* scale = check_floats(*branch_scale, "branch_scale", images);
  Tensor gate = empty_floats({images, channels});
  for (int64_t n = 0; n < images; ++n) std::fill_n(floats(gate) + n * channels, channels, scale[n]);
  return gate;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> block_forward(
    const Tensor& x, const OptionalTensor& w_expand, const OptionalTensor& bn1_weight, const OptionalTensor& bn1_bias,
    double bn1_eps, const Tensor& w_depthwise, const Tensor& bn2_weight, const Tensor& bn2_bias, double bn2_eps,
    const Tensor& w_se_reduce, const Tensor& b_se_reduce, const Tensor& w_se_expand, const Tensor& b_se_expand,
    const Tensor& w_project, const Tensor& bn3_weight, const Tensor& bn3_bias, double bn3_eps,
    const OptionalTensor& branch_scale, int64_t stride, bool same, bool residual, bool sweep) {
  const Tensor nothing = torch::stable::empty({0}, x.scalar_type());
  Tensor e = w_expand ? nothing : x, stats1 = empty_floats({0}), moments = empty_floats({0});
  OptionalTensor scale1, shift1;
  if (w_expand) {
    STD_TORCH_CHECK(bn1_weight && bn1_bias, "bn1_weight, bn1_bias: must be given with w_expand");
    Tensor mean, m2;
    if (sweep)
      std::tie(mean, m2, moments) = expand_stats(x, *w_expand);
    else
      std::tie(e, mean, m2) = pointwise_stats(x, *w_expand, std::nullopt, std::nullopt, std::nullopt);
    stats1 = batch_norm_stats(mean, m2, *bn1_weight, *bn1_bias, bn1_eps, values_per_channel(x));
    scale1 = torch::stable::select(stats1, 0, 0);
    shift1 = torch::stable::select(stats1, 0, 1);
  }
  const auto [y, mean2, m2_2] = w_expand && sweep
                                    ? expand_dwconv_stats(x, *w_expand, *scale1, *shift1, w_depthwise, stride, same)
                                    : dwconv_stats(e, w_depthwise, scale1, shift1, stride, same);
  const Tensor stats2 = batch_norm_stats(mean2, m2_2, bn2_weight, bn2_bias, bn2_eps, values_per_channel(y));
  const Norm norm2(stats2);
  const Tensor squeeze = squeeze_gate(pool(y, norm2.scale, norm2.shift, true), y.size(2) * y.size(3), w_se_reduce,
                                      b_se_reduce, w_se_expand, b_se_expand, x.scalar_type());
  const auto [p, mean3, m2_3] =
      pointwise_stats(y, w_project, norm2.scale, norm2.shift, torch::stable::select(squeeze, 0, 1));
  const Tensor stats3 = batch_norm_stats(mean3, m2_3, bn3_weight, bn3_bias, bn3_eps, values_per_channel(p));
  const Norm norm3(stats3);
  const Tensor out = apply(p, norm3.scale, norm3.shift, false, branch_gate(branch_scale, p.size(1)),
                           residual ? OptionalTensor(x) : std::nullopt);
  return {out, w_expand ? e : nothing, y, p, stats1, stats2, stats3, squeeze, moments};
}

// Gradients of x, bn3 [2, C] (weight, bias), bn2, w_project, w_depthwise, squeeze-excite's four, w_expand and bn1; the
// last two are empty without expansion, where e is x and its gradient comes in any case.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> block_backward(
    const Tensor& dout, const Tensor& x, const Tensor& e, const Tensor& y, const Tensor& p, const Tensor& stats1,
    const Tensor& stats2, const Tensor& stats3, const Tensor& squeeze, const Tensor& moments,
    const OptionalTensor& w_expand, const Tensor& w_depthwise, const Tensor& w_se_reduce, const Tensor& b_se_reduce,
    const Tensor& w_se_expand, const Tensor& b_se_expand, const Tensor& w_project, const OptionalTensor& branch_scale,
    int64_t stride, bool same, bool residual, bool input_grad) {
  const Norm norm2(stats2), norm3(stats3);
  const Tensor gate = torch::stable::select(squeeze, 0, 1);
  const OptionalTensor branch = branch_gate(branch_scale, p.size(1));
  const auto row = [](const Tensor& t, int64_t i) { return torch::stable::select(t, 0, i); };
  const auto affine = [](Tensor grad) { return torch::stable::narrow(grad, 0, 0, 2); };

  const Tensor sums3 = backward_sums(dout, p, norm3.scale, norm3.shift, norm3.mean, norm3.rstd, false);
  const Tensor dbn3 = batch_norm_grad(stats3, sums3, branch, std::nullopt, values_per_channel(p));
  const auto [dh, dw_project, sums2] =
      backward_pointwise(dout, p, y, w_project, norm3.scale, norm3.shift, norm3.mean, false, branch, row(dbn3, 2),
                         row(dbn3, 3), norm2.scale, norm2.shift, norm2.mean, norm2.rstd, gate, std::nullopt, true);
  const auto [pooled_grad, dw_se_reduce, db_se_reduce, dw_se_expand, db_se_expand] =
      squeeze_gate_grad(squeeze, row(sums2, 0), y.size(2) * y.size(3), w_se_reduce, b_se_reduce, w_se_expand, b_se_expand,
                        x.scalar_type());
  const Tensor dbn2 = batch_norm_grad(stats2, sums2, gate, pooled_grad, values_per_channel(y));

  const OptionalTensor added = residual ? OptionalTensor(dout) : std::nullopt;
  OptionalTensor scale1, shift1, mean1, rstd1;
  if (w_expand) {
    const Norm norm1(stats1);
    scale1 = norm1.scale, shift1 = norm1.shift, mean1 = norm1.mean, rstd1 = norm1.rstd;
  }
  Tensor dx, dw_depthwise, dw_expand = empty_floats({0}), dbn1 = empty_floats({0});
  if (moments.numel() > 0) {
    std::tie(dx, dw_expand, dw_depthwise, dbn1) = backward_expand_dwconv(
        dh, y, x, *w_expand, w_depthwise, norm2.scale, norm2.shift, norm2.mean, gate, pooled_grad, row(dbn2, 2),
        row(dbn2, 3), *scale1, *shift1, *mean1, *rstd1, moments, added, stride, same);
  } else {
    Tensor sums1;
    std::tie(dx, dw_depthwise, sums1) =
        backward_dwconv(dh, y, e, w_depthwise, norm2.scale, norm2.shift, norm2.mean, gate, pooled_grad, row(dbn2, 2),
                        row(dbn2, 3), scale1, shift1, mean1, rstd1, stride, same);
    if (w_expand) {
      const Tensor g = dx, grad1 = batch_norm_grad(stats1, torch::stable::unsqueeze(sums1, 1), std::nullopt, std::nullopt,
                                                   values_per_channel(e));
      std::tie(dx, dw_expand, std::ignore) =
          backward_pointwise(g, e, x, *w_expand, scale1, shift1, mean1, false, std::nullopt, row(grad1, 2), row(grad1, 3),
                             std::nullopt, std::nullopt, std::nullopt, std::nullopt, std::nullopt, added, input_grad);
      dbn1 = affine(grad1);
    } else if (residual) {
      dx = torch::stable::subtract(dx, dout, -1.0);  // the stable ABI has no add
    }
  }
  return {dx,           affine(dbn3), affine(dbn2), dw_project, dw_depthwise, dw_se_reduce, db_se_reduce,
          dw_se_expand, db_se_expand, dw_expand,    dbn1};
}

// Whether the images of a batch give all threads enough to do, each its own.
inline bool enough_images(int64_t images) {
  const int64_t threads = torch::stable::get_num_threads();
  return images > 1 && (images % threads == 0 || images >= 4 * threads);
}

// A block whose BatchNorms are folded; expand and project from `pack_pointwise`.
Tensor block_inference(const Tensor& x, const OptionalTensor& expand, const OptionalTensor& expand_shift,
                       const Tensor& w_depthwise, const Tensor& depthwise_shift, const Tensor& w_se_reduce,
                       const Tensor& b_se_reduce, const Tensor& w_se_expand, const Tensor& b_se_expand,
                       const Tensor& project, const Tensor& project_shift, int64_t stride, bool same, bool residual) {
  STD_TORCH_CHECK(!expand == !expand_shift, "expand_shift: must be given with expand, and only with it");
  const Shape s = check_nhwc(x, "x");
  const int64_t expanded = depthwise_shift.numel();
  const Tensor ones = empty_floats({expanded});
  std::fill_n(floats(ones), expanded, 1.f);
  const auto project_gated = [&](const Tensor& z, const Tensor& pooled, const Tensor& given, const Tensor& out) {
    const Tensor squeeze = squeeze_gate(pooled, z.size(2) * z.size(3), w_se_reduce, b_se_reduce, w_se_expand, b_se_expand,
                                        x.scalar_type());
    packed_pointwise(z, project, torch::stable::select(squeeze, 0, 1), project_shift, false,
                          residual ? OptionalTensor(given) : std::nullopt, out);
  };
  const auto depthwise = [&](const Tensor& e) {
    return dwconv_affine(e, w_depthwise, std::nullopt, std::nullopt, ones, depthwise_shift, stride, same);
  };

  const Shape image_shape{1, expanded, s.h, s.w};
  const Window win = depthwise_window(image_shape, w_depthwise, stride, same);
  Tensor out = empty_nhwc({s.n, project_shift.numel(), win.out_h, win.out_w}, x.scalar_type());
  // image by image, what is between the block's convolutions stays in cache; but not where the weights outweigh it
  if (!enough_images(s.n) || expanded * s.n * s.pixels() < 1 << 20) {
    const auto [z, pooled] = depthwise(expand ? packed_convolution(x, *expand, 1, 1, false, *expand_shift, true) : x);
    project_gated(z, pooled, x, out);
    return out;
  }
  if (expand) check_panels(*expand, x, expanded);
  const std::vector<float> weight = pack_depthwise(w_depthwise, image_shape, win, x);
  for_each_task(s.n, [&](int64_t n) {
    Tensor batch = x;
    const Tensor image = torch::stable::narrow(batch, 0, n, 1), into = torch::stable::narrow(out, 0, n, 1);
    const auto [z, pooled] = expand ? expand_depthwise(image, *expand, ones, *expand_shift, weight, win, depthwise_shift)
                                    : depthwise(image);
    project_gated(z, pooled, image, into);
  });
  return out;
}

}  // namespace effnet_fast
