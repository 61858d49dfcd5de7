"""The passes without a convolution. A program takes a run of pixels, a tile of lanes by channels at a time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_fast.passes.schema import empty_like_nhwc
from effnet_fast.passes.triton.arithmetic import (
    Norm,
    OutputGrad,
    load_image_channels,
    load_norm,
    load_output_grad,
    output_grad,
    silu,
)
from effnet_fast.passes.triton.configs import pointwise_config
from effnet_fast.passes.triton.launch import (
    PROGRAMS,
    check_activation,
    check_like,
    check_operands,
    empty_floats,
    group,
)
from effnet_fast.passes.triton.reductions import merge_moments, store_moments, sum_partials


@triton.jit
def channel_stats_kernel(
    x, partials, pixels, pixels_per_program, groups, GROUP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Each program's moments of its pixels: partials [programs, 3, C]."""
    channels = groups * GROUP
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.program_id(0).to(tl.int64) * pixels_per_program
    end = tl.minimum(begin + pixels_per_program, pixels)
    lane = begin + tl.arange(0, BLOCK_P)
    count = tl.zeros((BLOCK_P,), tl.float32)
    center = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    distance = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, pixels_per_program, BLOCK_P):
        pixel = lane + start
        inside = pixel < end
        mask = inside[:, None] & (c < channels)[None, :]
        value = tl.load(x + (pixel * channels)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        center = tl.where(start == 0, value, center)
        from_center = tl.where(inside[:, None], value - center, 0.0)
        distance += from_center
        square += from_center * from_center
        count += inside.to(tl.float32)
    store_moments(partials, center, distance, square, count, c, channels)


@triton.jit
def tile_pixels(program, segments, pixels_per_segment, pixels, BLOCK_P: tl.constexpr):
    """The image [BLOCK_P] and the first pixels [BLOCK_P] of a program's segment of it, and the segment's end."""
    n = program // segments
    begin = program % segments * pixels_per_segment
    lane = begin + tl.arange(0, BLOCK_P)
    return n + tl.zeros_like(lane), lane, tl.minimum(begin + pixels_per_segment, pixels)


@triton.jit
def pixel_offsets(n, pixel, pixels, c, channels):
    """In NHWC memory, in 64 bits: large batches pass 2^31 elements."""
    return ((n.to(tl.int64) * pixels + pixel) * channels)[:, None] + c[None, :]


@triton.jit
def pool_kernel(
    y, norm, partials, pixels, segments, pixels_per_segment, groups, GROUP: tl.constexpr,
    SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over each segment: partials [N * segments, C]."""
    channels = groups * GROUP
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    norm = load_norm(norm, c, channels)
    n, lane, end = tile_pixels(tl.program_id(0), segments, pixels_per_segment, pixels, BLOCK_P)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, pixels_per_segment, BLOCK_P):
        mask = (lane + start < end)[:, None] & (c < channels)[None, :]
        value = tl.load(y + pixel_offsets(n, lane + start, pixels, c, channels), mask=mask, other=0.0).to(tl.float32)
        u = value * norm.scale + norm.shift
        if SILU:
            u = silu(u)
        total += tl.where(mask, u, 0.0)
    tl.store(partials + tl.program_id(0).to(tl.int64) * channels + c, tl.sum(total, 0), mask=c < channels)


@triton.jit
def apply_kernel(
    y, norm, gate, residual, out, images, pixels, segments, groups, GROUP: tl.constexpr,
    SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = groups * GROUP
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    norm = load_norm(norm, c, channels)
    n, lane, end = tile_pixels(tl.program_id(0), segments, BLOCK_P, pixels, BLOCK_P)
    mask = (lane < end)[:, None] & (c < channels)[None, :]
    offsets = pixel_offsets(n, lane, pixels, c, channels)
    value = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32) * norm.scale + norm.shift
    if SILU:
        value = silu(value)
    if gate is not None:
        value *= load_image_channels(gate, n, c, channels, images)
    if residual is not None:
        value += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def backward_sums_kernel(
    grad, y, norm, partials, sum_stride, pixels, segments, pixels_per_segment, groups, GROUP: tl.constexpr,
    SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over each segment: partials [5 or 2, N * segments, C], sum_stride values from one sum to the next."""
    channels = groups * GROUP
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    norm = load_norm(norm, c, channels)
    n, lane, end = tile_pixels(tl.program_id(0), segments, pixels_per_segment, pixels, BLOCK_P)
    sum_grad = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)  # of grad times the slope, if there is one
    sum_grad_hat = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_grad_z = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_slope = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_slope_hat = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, pixels_per_segment, BLOCK_P):
        mask = (lane + start < end)[:, None] & (c < channels)[None, :]
        offsets = pixel_offsets(n, lane + start, pixels, c, channels)
        du = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
        hat = (value - norm.mean) * norm.rstd
        if SILU:
            u = value * norm.scale + norm.shift
            s = tl.sigmoid(u)
            slope = tl.where(mask, s * (1 + u * (1 - s)), 0.0)
            sum_grad_z += du * (u * s)
            sum_slope += slope
            sum_slope_hat += slope * hat
            du *= slope
        sum_grad += du
        sum_grad_hat += du * hat
    partials += tl.program_id(0).to(tl.int64) * channels + c
    if SILU:
        tl.store(partials, tl.sum(sum_grad_z, 0), mask=c < channels)
        tl.store(partials + sum_stride, tl.sum(sum_grad, 0), mask=c < channels)
        tl.store(partials + 2 * sum_stride, tl.sum(sum_slope, 0), mask=c < channels)
        tl.store(partials + 3 * sum_stride, tl.sum(sum_grad_hat, 0), mask=c < channels)
        tl.store(partials + 4 * sum_stride, tl.sum(sum_slope_hat, 0), mask=c < channels)
    else:
        tl.store(partials, tl.sum(sum_grad, 0), mask=c < channels)
        tl.store(partials + sum_stride, tl.sum(sum_grad_hat, 0), mask=c < channels)


@triton.jit
def backward_apply_kernel(
    grad, y, op, dy, images, pixels, segments, groups, GROUP: tl.constexpr,
    SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = groups * GROUP
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n, lane, end = tile_pixels(tl.program_id(0), segments, BLOCK_P, pixels, BLOCK_P)
    loaded = load_output_grad(op, n, c, channels, images)
    mask = (lane < end)[:, None] & (c < channels)[None, :]
    offsets = pixel_offsets(n, lane, pixels, c, channels)
    given = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(dy + offsets, output_grad(given, value, op, loaded, SILU).to(dy.dtype.element_ty), mask=mask)


def channel_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    check_activation(x, "x")
    n, channels, height, width = x.shape
    if x.numel() == 0:
        return x.new_zeros(channels, dtype=torch.float32), x.new_zeros(channels, dtype=torch.float32)
    config = pointwise_config(x)
    across = triton.cdiv(channels, config.channels)
    pixels = n * height * width
    run = triton.cdiv(triton.cdiv(pixels, max(1, PROGRAMS // across)), config.lanes) * config.lanes
    partials = empty_floats(x, triton.cdiv(pixels, run), 3, channels)
    channel_stats_kernel[(len(partials), across)](x, partials, pixels, run, *group(channels), **config.tile())
    return merge_moments(partials)


def _segments(y: Tensor, lanes: int, across: int) -> tuple[int, int]:
    """Segments of an image whose pixels are summed by one program, and their pixels: PROGRAMS in all, or so."""
    n, pixels = len(y), y.shape[2] * y.shape[3]
    run = triton.cdiv(triton.cdiv(pixels, max(1, PROGRAMS // (across * n))), lanes) * lanes
    return triton.cdiv(pixels, run), run


def pool(y: Tensor, scale: Tensor, shift: Tensor, silu: bool) -> Tensor:
    check_activation(y, "y")
    check_operands(y, scale=scale, shift=shift)
    n, channels, height, width = y.shape
    if y.numel() == 0:
        return y.new_zeros(n, channels, dtype=torch.float32)
    config = pointwise_config(y)
    across = triton.cdiv(channels, config.channels)
    segments, run = _segments(y, config.lanes, across)
    partials = empty_floats(y, n, segments, channels)
    pool_kernel[(n * segments, across)](
        y, Norm(scale, shift), partials, height * width, segments, run, *group(channels), SILU=silu, **config.tile()
    )
    return sum_partials(partials)


def apply(y: Tensor, scale: Tensor, shift: Tensor, silu: bool, gate: Tensor | None, residual: Tensor | None) -> Tensor:
    check_activation(y, "y")
    check_operands(y, scale=scale, shift=shift, gate=gate)
    if residual is not None:
        check_like(residual, "residual", y, "y")
    out = empty_like_nhwc(y)
    if y.numel() == 0:
        return out
    n, channels, height, width = y.shape
    config = pointwise_config(y)
    segments = triton.cdiv(height * width, config.lanes)
    apply_kernel[(n * segments, triton.cdiv(channels, config.channels))](
        y, Norm(scale, shift), gate, residual, out, n, height * width, segments, *group(channels),
        SILU=silu, **config.tile(),
    )  # fmt: skip
    return out


def backward_sums(
    grad: Tensor, y: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> Tensor:
    check_activation(y, "y")
    check_like(grad, "grad", y, "y")
    check_operands(y, scale=scale, shift=shift, mean=mean, rstd=rstd)
    n, channels, height, width = y.shape
    sums = 5 if silu else 2
    if y.numel() == 0:
        return y.new_zeros(sums, n, channels, dtype=torch.float32)
    config = pointwise_config(y)
    across = triton.cdiv(channels, config.channels)
    segments, run = _segments(y, config.lanes, across)
    partials = empty_floats(y, sums * n, segments, channels)
    backward_sums_kernel[(n * segments, across)](
        grad, y, Norm(scale, shift, mean, rstd), partials, n * segments * channels, height * width, segments, run,
        *group(channels), SILU=silu, **config.tile(),
    )  # fmt: skip
    return sum_partials(partials).view(sums, n, channels)


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
    check_activation(y, "y")
    check_like(grad, "grad", y, "y")
    check_operands(y, scale=scale, shift=shift, mean=mean, gate=gate, pooled_grad=pooled_grad, a=a, b=b)
    dy = empty_like_nhwc(y)
    if y.numel() == 0:
        return dy
    n, channels, height, width = y.shape
    config = pointwise_config(y)
    segments = triton.cdiv(height * width, config.lanes)
    backward_apply_kernel[(n * segments, triton.cdiv(channels, config.channels))](
        grad, y, OutputGrad(scale, shift, mean, gate, pooled_grad, a, b), dy, n, height * width, segments,
        *group(channels), SILU=silu, **config.tile(),
    )  # fmt: skip
    return dy
