"""The sweeps composed of a backend's other passes: the meaning of those of `schema.SWEEPS`.

Here the tensor between the two convolutions is stored, in float32 or wider.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effnet_fast.passes.algebra import Norm


def expand_stats(passes: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pixels = _wide(x).permute(0, 2, 3, 1).flatten(0, 2)
    count = max(len(pixels), 1)
    mean = pixels.sum(0) / count
    covariance = (pixels - mean).T @ (pixels - mean) / count
    return *passes.channel_stats(_expanded(x, weight)), torch.cat([mean[None], covariance])


def expand_dwconv_stats(
    passes: Any,
    x: Tensor,
    w_expand: Tensor,
    scale: Tensor,
    shift: Tensor,
    w_depthwise: Tensor,
    stride: int,
    same: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, m2 = passes.dwconv_stats(_expanded(x, w_expand), w_depthwise, scale, shift, stride, same)
    return y.to(x.dtype), mean, m2


def backward_expand_dwconv(
    passes: Any,
    grad: Tensor,
    y: Tensor,
    x: Tensor,
    w_expand: Tensor,
    w_depthwise: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    gate: Tensor | None,
    pooled_grad: Tensor | None,
    a: Tensor,
    b: Tensor,
    in_scale: Tensor,
    in_shift: Tensor,
    in_mean: Tensor,
    in_rstd: Tensor,
    moments: Tensor,
    residual: Tensor | None,
    stride: int,
    same: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    e, norm, none = _expanded(x, w_expand), Norm(in_scale, in_shift, in_mean, in_rstd), (None,) * 5
    output = (_wide(grad), _wide(y), e, w_depthwise, scale, shift, mean, gate, pooled_grad, a, b)
    g, dw_depthwise, sums = passes.backward_dwconv(*output, *norm, stride, same)
    stats = torch.stack([*norm, in_rstd])  # of the last row, the variance, a gradient has no use
    affine, terms = passes.batch_norm_grad(stats, sums[:, None], None, None, max(e.numel() // e.shape[1], 1)).split(2)
    added = None if residual is None else _wide(residual)
    dx, dw_expand, _ = passes.backward_pointwise(
        g, e, _wide(x), w_expand, *norm[:3], False, None, *terms, *none, added, True
    )
    return dx.to(x.dtype), dw_expand, dw_depthwise, affine


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _expanded(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(_wide(x), weight.to(_wide(x).dtype)).contiguous(memory_format=torch.channels_last)
