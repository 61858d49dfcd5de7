"""Every pass in plain PyTorch: the meaning of the schemas, the oracle of the tests, and what runs in float64.

Works in the accumulation dtype (float32, or float64 for float64 input) and rounds stored activations once, as the
kernels do.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as conv_grad


def _accumulate(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _store(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype).contiguous(memory_format=torch.channels_last)


def _channels(v: Tensor) -> Tensor:
    """[C] or [N, C], to be broadcast over an activation."""
    return v[..., None, None] if v.dim() == 2 else v[:, None, None]


def _silu_slope(u: Tensor) -> Tensor:
    s = u.sigmoid()
    return s * (1 + u * (1 - s))


def _moments(y: Tensor) -> tuple[Tensor, Tensor]:
    mean = y.mean((0, 2, 3)) if y.numel() else y.new_zeros(y.shape[1])
    return mean, (y - _channels(mean)).square().sum((0, 2, 3))


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding before and after, along one dimension."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def dwconv(x: Tensor, weight: Tensor, stride: int, same: bool) -> Tensor:
    """Depthwise convolution with symmetric or SAME padding."""
    kernel = weight.shape[-1]
    padding = kernel // 2
    if same:
        x = F.pad(x, (*same_padding(x.shape[3], kernel, stride), *same_padding(x.shape[2], kernel, stride)))
        padding = 0
    return F.conv2d(x, weight, None, stride, padding, groups=x.shape[1])


def _dwconv_grad(x: Tensor, weight: Tensor, dy: Tensor, stride: int, same: bool) -> tuple[Tensor, Tensor]:
    height, width, kernel = x.shape[2], x.shape[3], weight.shape[-1]
    top, left = [same_padding(n, kernel, stride)[0] if same else kernel // 2 for n in (height, width)]
    # The padded input, cut where the last window ends: every window is then inside of it.
    bottom, right = [
        (outputs - 1) * stride + kernel - size - before
        for outputs, size, before in ((dy.shape[2], height, top), (dy.shape[3], width, left))
    ]
    padded = F.pad(x, (left, right, top, bottom))
    dpadded = conv_grad.conv2d_input(padded.shape, weight, dy, stride, groups=x.shape[1])
    dweight = conv_grad.conv2d_weight(padded, weight.shape, dy, stride, groups=x.shape[1])
    return F.pad(dpadded, (-left, -right, -top, -bottom)), dweight


def _activate_input(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    x = _accumulate(x)
    return x if scale is None else F.silu(x * _channels(scale) + _channels(shift))


def channel_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    return _moments(_accumulate(x))


def dwconv_stats(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, stride: int, same: bool
) -> tuple[Tensor, Tensor, Tensor]:
    activated = _activate_input(x, scale, shift)
    y = dwconv(activated, weight.to(activated.dtype), stride, same)
    return _store(y, x), *_moments(y)


def _affine(y: Tensor, scale: Tensor, shift: Tensor, silu: bool) -> Tensor:
    u = _accumulate(y) * _channels(scale) + _channels(shift)
    return F.silu(u) if silu else u


def pool(y: Tensor, scale: Tensor, shift: Tensor, silu: bool) -> Tensor:
    return _affine(y, scale, shift, silu).sum((2, 3))


def apply(y: Tensor, scale: Tensor, shift: Tensor, silu: bool, gate: Tensor | None, residual: Tensor | None) -> Tensor:
    out = _affine(y, scale, shift, silu)
    if gate is not None:
        out = out * _channels(gate)
    if residual is not None:
        out = out + residual
    return _store(out, y)


def backward_sums(
    grad: Tensor, y: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> Tensor:
    grad, value = _accumulate(grad), _accumulate(y)
    hat = (value - _channels(mean)) * _channels(rstd)
    if not silu:
        return torch.stack([grad, grad * hat]).sum((3, 4))
    u = value * _channels(scale) + _channels(shift)
    slope = _silu_slope(u)
    return torch.stack([grad * F.silu(u), grad * slope, slope, grad * slope * hat, slope * hat]).sum((3, 4))


def _output_grad(
    grad: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    silu: bool,
    gate: Tensor | None,
    pooled_grad: Tensor | None,
    a: Tensor,
    b: Tensor,
) -> Tensor:
    du, value = _accumulate(grad), _accumulate(y)
    if gate is not None:
        du = du * _channels(gate)
    if pooled_grad is not None:
        du = du + _channels(pooled_grad)
    if silu:
        du = du * _silu_slope(value * _channels(scale) + _channels(shift))
    return du * _channels(scale) + (value - _channels(mean)) * _channels(b) + _channels(a)


def backward_apply(
    grad: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    silu: bool,
    gate: Tensor | None,
    pooled_grad: Tensor | None,
    a: Tensor,
    b: Tensor,
) -> Tensor:
    return _store(_output_grad(grad, y, scale, shift, mean, silu, gate, pooled_grad, a, b), y)


def backward_dwconv(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    gate: Tensor | None,
    pooled_grad: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_mean: Tensor | None,
    in_rstd: Tensor | None,
    stride: int,
    same: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dy = _accumulate(grad)
    if scale is not None:
        dy = _output_grad(grad, y, scale, shift, mean, True, gate, pooled_grad, a, b)
    activated = _activate_input(x, in_scale, in_shift)
    da, dweight = _dwconv_grad(activated, weight.to(activated.dtype), dy, stride, same)
    if in_scale is None:
        return _store(da, x), dweight, dweight.new_zeros(2, x.shape[1])
    value = _accumulate(x)
    g = _store(da * _silu_slope(value * _channels(in_scale) + _channels(in_shift)), x)
    hat = (value - _channels(in_mean)) * _channels(in_rstd)
    wide_g = _accumulate(g)
    return g, dweight, torch.stack([wide_g, wide_g * hat]).sum((1, 3, 4))


def dwconv_affine(
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    stride: int,
    same: bool,
) -> tuple[Tensor, Tensor]:
    activated = _activate_input(x, in_scale, in_shift)
    y = dwconv(activated, weight.to(activated.dtype), stride, same)
    z = F.silu(y * _channels(scale) + _channels(shift))
    return _store(z, x), z.sum((2, 3))
