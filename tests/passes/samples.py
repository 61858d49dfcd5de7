"""Sample calls of every pass: the same for every backend, over the shapes that trip kernels up."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# N, C, H, W: B0-like, one pixel, fewer pixels than a kernel's columns, a half-full last vector, H != W, wide rows, more
# rows than columns, no examples
SHAPES = (
    (2, 32, 14, 14),
    (1, 8, 1, 1),
    (3, 24, 2, 3),
    (3, 40, 9, 6),
    (1, 96, 3, 31),
    (5, 24, 17, 2),
    (2, 144, 7, 7),
    (1, 16, 2, 65),
    (0, 16, 5, 5),
)
CONVOLUTIONS = tuple((k, s, same) for k in (3, 5, 7) for s in (1, 2) for same in (False, True))


OUT_CHANNELS = (8, 16, 40, 104)


@dataclass
class Call:
    """A pass and its arguments; activations in the storage dtype, the rest in float32."""

    name: str
    args: tuple[Any, ...]

    def to_float64(self) -> tuple[Any, ...]:
        return tuple(a.double() if isinstance(a, Tensor) else a for a in self.args)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def activation(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # a mean of a half, so that a forgotten mean shows
    return channels_last((torch.randn(shape, generator=generator) + 0.5).to(dtype))


def elementwise_calls(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Iterator[Call]:
    """The passes without a convolution."""
    g = torch.Generator().manual_seed(sum(shape))
    n, c = shape[:2]
    x, grad, residual = (activation(g, shape, dtype) for _ in range(3))
    scale, rstd, gate = (
        torch.rand(c, generator=g) + 0.5,
        torch.rand(c, generator=g) + 0.5,
        torch.rand(n, c, generator=g),
    )
    shift, mean, a, b = (torch.randn(c, generator=g) * 0.3 for _ in range(4))
    pooled_grad = torch.randn(n, c, generator=g)
    yield Call("channel_stats", (x,))
    for silu in (True, False):
        yield Call("pool", (x, scale, shift, silu))
        yield Call("backward_sums", (grad, x, scale, shift, mean, rstd, silu))
        for gated in (None, gate):
            for added in (None, residual):
                yield Call("apply", (x, scale, shift, silu, gated, added))
            for pooled in (None, pooled_grad):
                yield Call("backward_apply", (grad, x, scale, shift, mean, silu, gated, pooled, a, b))


def depthwise_calls(
    shape: tuple[int, int, int, int], dtype: torch.dtype, kernel: int, stride: int, same: bool
) -> Iterator[Call]:
    """The passes with a depthwise convolution."""
    g = torch.Generator().manual_seed(sum(shape) + kernel + stride)
    n, c = shape[:2]
    x = activation(g, shape, dtype)
    weight = torch.randn(c, 1, kernel, kernel, generator=g) / kernel
    scale, rstd, gate = (
        torch.rand(c, generator=g) + 0.5,
        torch.rand(c, generator=g) + 0.5,
        torch.rand(n, c, generator=g),
    )
    shift, mean, a, b = (torch.randn(c, generator=g) * 0.3 for _ in range(4))
    pooled_grad = torch.randn(n, c, generator=g)
    out_h, out_w = (-(-size // stride) for size in shape[2:])  # of either padding, for odd kernels
    y, grad = (activation(g, (n, c, out_h, out_w), dtype) for _ in range(2))
    for affine in ((None, None), (scale, shift)):
        yield Call("dwconv_stats", (x, weight, *affine, stride, same))
        yield Call("dwconv_affine", (x, weight, *affine, rstd, mean, stride, same))
    without_norm: tuple[None, ...] = (None,) * 7
    for out in (without_norm, (scale, shift, mean, None, None, a, b), (scale, shift, mean, gate, pooled_grad, a, b)):
        for norm in ((None,) * 4, (scale, shift, mean, rstd)):
            source = None if out is without_norm else y
            yield Call("backward_dwconv", (grad, source, x, weight, *out, *norm, stride, same))


def product_calls(shape: tuple[int, int, int, int], dtype: torch.dtype, out_channels: int) -> Iterator[Call]:
    """The 1x1 convolutions."""
    g = torch.Generator().manual_seed(sum(shape) + out_channels)
    n, c = shape[:2]
    x, residual = (activation(g, shape, dtype) for _ in range(2))
    grad, out_residual = (activation(g, (n, out_channels, *shape[2:]), dtype) for _ in range(2))
    weight = torch.randn(out_channels, c, 1, 1, generator=g) / c**0.5
    y = channels_last(F.conv2d(x.float(), weight).to(dtype))
    in_scale, in_rstd, in_gate = (torch.rand(size, generator=g) + 0.5 for size in ((c,), (c,), (n, c)))
    scale, gate = (torch.rand(size, generator=g) + 0.5 for size in ((out_channels,), (n, out_channels)))
    in_shift, in_mean = (torch.randn(c, generator=g) * 0.3 for _ in range(2))
    shift, mean, a, b = (torch.randn(out_channels, generator=g) * 0.3 for _ in range(4))
    for kernel, stride, same in ((3, 2, False), (5, 1, True), (3, 2, True)):
        yield Call("patches", (channels_last(x[:, : out_channels // 8]), kernel, stride, same))
    for affine in ((None, None), (in_scale, in_shift)):
        for gated in (None, in_gate):
            yield Call("pointwise_stats", (x, weight, *affine, gated))
    for silu in (True, False):
        for gated, added in ((None, None), (in_gate, out_residual)):
            yield Call("pointwise_affine", (x, weight, gated, scale, shift, silu, added))
    none: tuple[None, ...] = (None,) * 5
    for out in (
        (None, None, None, False, None, None, None),
        (scale, shift, mean, False, None, a, b),
        (scale, shift, mean, False, gate, a, b),
        (scale, shift, mean, True, None, a, b),
    ):
        source = y if out[0] is not None else None
        for added in (None, residual):
            yield Call("backward_pointwise", (grad, source, x, weight, *out, *none, added, True))
        yield Call("backward_pointwise", (grad, source, x, weight, *out, *none, None, False))
        for gated in (None, in_gate):
            norm = (in_scale, in_shift, in_mean, in_rstd, gated)
            yield Call("backward_pointwise", (grad, source, x, weight, *out, *norm, None, True))


def sweep_calls(
    shape: tuple[int, int, int, int], dtype: torch.dtype, kernel: int, stride: int, same: bool, expanded: int
) -> Iterator[Call]:
    """Expansion and depthwise convolution in one."""
    g = torch.Generator().manual_seed(sum(shape) + kernel + stride + expanded)
    n, c = shape[:2]
    x, residual = (activation(g, shape, dtype) for _ in range(2))
    w_expand = torch.randn(expanded, c, 1, 1, generator=g) / c**0.5
    w_expand = w_expand.to(dtype).float()  # what products make of it, so that float64 has the same statistics
    w_depthwise = torch.randn(expanded, 1, kernel, kernel, generator=g) / kernel
    yield Call("expand_stats", (x, w_expand))
    pixels = x.double().permute(1, 0, 2, 3).flatten(1)
    center = pixels.mean(1) if n else pixels.new_zeros(c)
    covariance = torch.cov(pixels, correction=0) if n else pixels.new_zeros(c, c)
    matrix = w_expand.double().flatten(1)
    mean, rstd = matrix @ center, (((matrix @ covariance) * matrix).sum(1) + 1e-3).rsqrt()
    in_scale = (torch.rand(expanded, generator=g) + 0.5) * rstd
    in_shift = torch.randn(expanded, generator=g) * 0.3 - mean * in_scale
    norm = [v.float() for v in (in_scale, in_shift, mean, rstd)]
    yield Call("expand_dwconv_stats", (x, w_expand, *norm[:2], w_depthwise, stride, same))
    scale, gate, pooled_grad = (
        torch.rand(size, generator=g) + 0.5 for size in ((expanded,), (n, expanded), (n, expanded))
    )
    shift, mean2, a, b = (torch.randn(expanded, generator=g) * 0.3 for _ in range(4))
    out_h, out_w = (-(-size // stride) for size in shape[2:])
    y, grad = (activation(g, (n, expanded, out_h, out_w), dtype) for _ in range(2))
    moments = torch.cat([center[None], covariance]).float()
    weights = (grad, y, x, w_expand, w_depthwise)
    for gated, pooled, added in ((None, None, None), (gate, pooled_grad, residual)):
        output = (scale, shift, mean2, gated, pooled, a, b)
        yield Call("backward_expand_dwconv", (*weights, *output, *norm, moments, added, stride, same))


def algebra_calls(images: int, channels: int, squeezed: int, dtype: torch.dtype = torch.float32) -> Iterator[Call]:
    """What stands between the passes. dtype: the activations'."""
    g = torch.Generator().manual_seed(images + channels + squeezed)
    weight, bias, mean = (torch.randn(channels, generator=g) for _ in range(3))
    m2 = torch.rand(channels, generator=g) * 7
    for count in (0, 1, 35):
        yield Call("batch_norm_stats", (mean, m2, weight, bias, 1e-3, count))
    stats, sums = torch.rand(5, channels, generator=g) + 0.5, torch.randn(5, images, channels, generator=g)
    gate, pooled_grad, dgate = (torch.randn(images, channels, generator=g) for _ in range(3))
    for factor in (None, gate):
        yield Call("batch_norm_grad", (stats, sums[:2], factor, None, 35))
        for pooled in (None, pooled_grad):
            yield Call("batch_norm_grad", (stats, sums, factor, pooled, 35))
    w_reduce = torch.randn(squeezed, channels, 1, 1, generator=g) / channels**0.5
    w_expand = torch.randn(channels, squeezed, 1, 1, generator=g) / squeezed**0.5
    mlp = (w_reduce, torch.randn(squeezed, generator=g), w_expand, bias)
    yield Call("squeeze_gate", (torch.randn(images, channels, generator=g) * 35, 35, *mlp, dtype))
    yield Call("squeeze_gate_grad", (torch.rand(2, images, channels, generator=g), dgate, 35, *mlp, dtype))
