"""What the kernels share: a BatchNorm's operands, SiLU and its slope, loads and stores.

A tile of a kernel is [BLOCK_P, BLOCK_C]: BLOCK_P lanes, each at a pixel of its own, by channels, which lie next to each
other in memory. Everything is float32 from the load on. An operand that is not given has None for a pointer: the
branches on that are taken when the kernel is compiled. Its loaded value is a zero that is never used, and not None,
which functions can't return in Triton 3.6.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Norm(NamedTuple):
    """A BatchNorm whose statistics are known, [C] each: u = y * scale + shift, hat = (y - mean) * rstd."""

    scale: Any
    shift: Any
    mean: Any = None
    rstd: Any = None


class OutputGrad(NamedTuple):
    """Operands of `output_grad`: [C], but gate and pooled_grad [N, C]. All None: the gradient is given as it is."""

    scale: Any
    shift: Any
    mean: Any
    gate: Any
    pooled_grad: Any
    a: Any
    b: Any


@triton.jit
def silu(u):
    return u * tl.sigmoid(u)


@triton.jit
def silu_slope(u):
    """The derivative of SiLU at u."""
    s = tl.sigmoid(u)
    return s * (1 + u * (1 - s))


@triton.jit
def output_grad(grad, y, op, loaded, SILU: tl.constexpr):
    """The gradient of y through its BatchNorm, SiLU and gate: see `passes.schema`. loaded: op's values."""
    du = grad
    if op.gate is not None:
        du = du * loaded.gate
    if op.pooled_grad is not None:
        du = du + loaded.pooled_grad
    if SILU:
        du = du * silu_slope(y * loaded.scale + loaded.shift)
    return du * loaded.scale + (y - loaded.mean) * loaded.b + loaded.a


@triton.jit
def load_channels(pointer, c, channels):
    """A [C] operand at the channels c: [1, BLOCK_C]."""
    if pointer is None:
        return 0.0
    else:
        return tl.load(pointer + c, mask=c < channels, other=0.0)[None, :]


@triton.jit
def load_image_channels(pointer, n, c, channels, images):
    """A [N, C] operand at the images n and the channels c: [BLOCK_P, BLOCK_C]."""
    if pointer is None:
        return 0.0
    else:
        mask = (n < images)[:, None] & (c < channels)[None, :]
        return tl.load(pointer + (n * channels)[:, None] + c[None, :], mask=mask, other=0.0)


@triton.jit
def load_norm(norm, c, channels):
    return Norm(
        load_channels(norm.scale, c, channels),
        load_channels(norm.shift, c, channels),
        load_channels(norm.mean, c, channels),
        load_channels(norm.rstd, c, channels),
    )


@triton.jit
def load_output_grad(op, n, c, channels, images):
    return OutputGrad(
        load_channels(op.scale, c, channels),
        load_channels(op.shift, c, channels),
        load_channels(op.mean, c, channels),
        load_image_channels(op.gate, n, c, channels, images),
        load_image_channels(op.pooled_grad, n, c, channels, images),
        load_channels(op.a, c, channels),
        load_channels(op.b, c, channels),
    )


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tuple of tiles."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles += (tl.zeros((BLOCK_P, BLOCK_C), tl.float32),)
    return tiles
