"""The 1x1 convolutions composed of a backend's other passes and PyTorch's matrix products.

For backends without fused products of their own, and the meaning of those of `schema.PRODUCTS`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effnet_fast.passes.reference import same_padding

# Values of y from which the backward pass of convolution and BatchNorm avoids dy: its way to memory and back takes as
# long as the two dozen small operators that it takes to do without, 50 us on an H200.
WITHOUT_DY = 1 << 24


def patches(passes: Any, x: Tensor, kernel: int, stride: int, same: bool) -> Tensor:
    windows = F.pad(x, window_padding(x, kernel, stride, same)).unfold(2, kernel, stride).unfold(3, kernel, stride)
    rows = windows.permute(0, 2, 3, 4, 5, 1).flatten(3)
    return F.pad(rows, (0, -rows.shape[3] % 8)).permute(0, 3, 1, 2)


def patches_grad(dpatches: Tensor, x: Tensor, kernel: int, stride: int, same: bool) -> Tensor:
    """The gradient of x from that of `patches`."""
    _, c, h, w = x.shape
    left, right, top, bottom = window_padding(x, kernel, stride, same)
    columns = dpatches[:, : kernel * kernel * c].flatten(2).unflatten(1, (kernel * kernel, c)).transpose(1, 2)
    wide = columns.flatten(1, 2).to(torch.promote_types(x.dtype, torch.float32))
    folded = F.fold(wide, (h + top + bottom, w + left + right), kernel, stride=stride)
    return F.pad(folded, (-left, -right, -top, -bottom)).to(x.dtype)


def pointwise_stats(
    passes: Any, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    y = _product(_activated(passes, x, scale, shift, gate), weight)
    return y, *passes.channel_stats(y)


def pointwise_affine(
    passes: Any,
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    silu: bool,
    residual: Tensor | None,
) -> Tensor:
    return passes.apply(_product(_activated(passes, x, None, None, gate), weight), scale, shift, silu, None, residual)


def backward_pointwise(
    passes: Any,
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    silu: bool,
    gate: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_mean: Tensor | None,
    in_rstd: Tensor | None,
    in_gate: Tensor | None,
    residual: Tensor | None,
    input_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    floats = torch.promote_types(x.dtype, torch.float32)
    only_norm = scale is not None and not silu and gate is None and in_scale is None and in_gate is None
    if only_norm and input_grad and weight.shape[1] < weight.shape[0] and grad.numel() >= WITHOUT_DY:
        dx, dweight = _backward_norm_pointwise(passes, grad, x, weight, scale, mean, a, b, residual)
        return dx, dweight, x.new_empty(0, len(x), 0, dtype=floats)
    dy = grad if scale is None else passes.backward_apply(grad, y, scale, shift, mean, silu, gate, None, a, b)
    rows, matrix = _pixels(dy), weight.flatten(1).to(dy.dtype)
    n, c, h, w = x.shape
    activated = _pixels(_activated(passes, x, in_scale, in_shift, in_gate))
    dweight = _float_product(rows.T, activated).view(weight.shape)
    if not input_grad:
        return torch.empty_like(x[:0]), dweight, x.new_empty(0, n, 0, dtype=floats)
    dx = rows @ matrix if residual is None else torch.addmm(_pixels(residual), rows, matrix)
    dx = dx.view(n, h, w, c).permute(0, 3, 1, 2)
    if in_scale is None:
        return dx, dweight, x.new_empty(0, n, 0, dtype=floats)
    return dx, dweight, passes.backward_sums(dx, x, in_scale, in_shift, in_mean, in_rstd, True)


def _backward_norm_pointwise(
    passes: Any,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    mean: Tensor,
    a: Tensor,
    b: Tensor,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight where a BatchNorm follows the convolution, without the gradient dy between them.

    y = W x at every pixel, so that dy = scale * grad + b * W (x - x_mean) + c, c = a + b * (W x_mean - mean). As x has
    few channels, where grad and dy have many, this moves far less than dy's way to memory and back:

        W' dy      = (scale W)' grad + (W' b W) (x - x_mean) + W' c
        sum dy x'  = scale sum grad x' + b W sum (x - x_mean) x' + c sum x'

    The sums over pixels stay in float32, as they nearly cancel.
    """
    n, channels, height, width = x.shape
    rows, pixels, matrix = _pixels(grad), _pixels(x), weight.flatten(1).to(x.dtype).to(scale.dtype)
    scaled, bent = scale[:, None] * matrix, b[:, None] * matrix
    x_mean, _ = passes.channel_stats(x)
    c = torch.addcmul(a, b, (matrix @ x_mean).sub_(mean))
    through_x = (matrix.T @ bent).to(x.dtype)
    constant = (matrix.T @ c).addmv_(through_x.to(scale.dtype), x_mean, alpha=-1).to(x.dtype)
    given = constant if residual is None else _pixels(residual) + constant
    dx = torch.addmm(given, pixels, through_x).addmm_(rows, scaled.to(x.dtype))
    around_mean = _float_product(pixels.T, pixels).addr_(x_mean, x_mean, alpha=-len(pixels))
    dweight = scale[:, None] * _float_product(rows.T, pixels)
    dweight.addmm_(bent, around_mean).addr_(c, x_mean, alpha=len(pixels))
    return dx.view(n, height, width, channels).permute(0, 3, 1, 2), dweight.view(weight.shape)


def _float_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 (float64 for float64)."""
    if a.dtype not in (torch.float16, torch.bfloat16):
        return a @ b
    if a.device.type == "cuda" and torch.version.cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def window_padding(x: Tensor, kernel: int, stride: int, same: bool) -> tuple[int, int, int, int]:
    """Zeros left, right, above and below of x, as `F.pad` takes them."""
    if not same:
        return (kernel // 2,) * 4
    return (*same_padding(x.shape[3], kernel, stride), *same_padding(x.shape[2], kernel, stride))


def identity(x: Tensor) -> tuple[Tensor, Tensor]:
    """scale and shift under which the passes leave x as it is."""
    zeros = x.new_zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return zeros + 1, zeros


def _activated(passes: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None, gate: Tensor | None) -> Tensor:
    if scale is None and gate is None:
        return x
    if scale is None:
        return passes.apply(x, *identity(x), False, gate, None)
    return passes.apply(x, scale, shift, True, gate, None)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1).to(x.dtype)).permute(0, 3, 1, 2)


def _pixels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
