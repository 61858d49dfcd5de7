"""Depthwise convolution, forward: `dwconv_stats` for training, `dwconv_affine` for inference.

A lane owns a strip of outputs, COLUMNS columns by some rows, and walks down it. At every step it loads the STRIDE rows
of the input that come next, activates each pixel once, and adds it to all the outputs that see it. These lie in REACH
rows, REACH = ceil(KERNEL / STRIDE), of which the uppermost is then complete.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_fast.passes.schema import convolution_output
from effnet_fast.passes.triton.arithmetic import Norm, load_norm, silu, zeros
from effnet_fast.passes.triton.configs import depthwise_config
from effnet_fast.passes.triton.launch import (
    check_activation,
    check_operands,
    check_window,
    empty_floats,
    group,
    pack_weight,
    padding,
    strip_rows,
)
from effnet_fast.passes.triton.reductions import merge_moments, store_moments, sum_partials
from effnet_fast.passes.triton.strips import Images, column_mask, row_mask, row_pointers, strip_corners


@triton.jit
def load_input(pointer, inside, norm, loaded):
    """Pixels of the convolution's input: x, or SiLU(BatchNorm(x)). The padding is zero after the activation.

    loaded: the norm's values.
    """
    value = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    if norm.scale is None:
        return value
    else:
        return tl.where(inside, silu(value * loaded.scale + loaded.shift), 0.0)


@triton.jit
def take_step(
    outputs, x, weight, n, row, left, norm, loaded, inputs, c, channels,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, REACH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds the input's rows `row` to `row + STRIDE - 1` to the outputs that see them.

    outputs: REACH rows of COLUMNS tiles, the lowest row first. The j-th row sees the input's row `row + phase` through
    the kernel's row `phase + STRIDE * j`.
    """
    for phase in tl.static_range(STRIDE):
        pointers = row_pointers(x, n, row + phase, left, inputs, c, channels)
        in_row = row_mask(n, row + phase, inputs, c, channels)
        pixels = ()
        for i in tl.static_range((COLUMNS - 1) * STRIDE + KERNEL):
            pixels += (load_input(pointers + i * channels, in_row & column_mask(left + i, inputs), norm, loaded),)
        for j in tl.static_range(REACH):
            outputs_row = outputs[:COLUMNS]
            if phase + STRIDE * j < KERNEL:
                for kw in tl.static_range(KERNEL):
                    tap = tl.load(weight + ((phase + STRIDE * j) * KERNEL + kw) * BLOCK_C)
                    # Each sum is taken from the front of its tuple and put at the back: the order stays.
                    for t in tl.static_range(COLUMNS):
                        outputs_row = outputs_row[1:] + (outputs_row[0] + pixels[t * STRIDE + kw] * tap,)
            outputs = outputs[COLUMNS:] + outputs_row
    return outputs


@triton.jit
def dwconv_stats_kernel(
    x, weight, norm, y, partials, inputs, images, rows, pad_h, pad_w, groups, GROUP: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y, and each program's moments of it: partials [programs, 3, C]."""
    REACH: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    channels = groups * GROUP
    lane_c = tl.arange(0, BLOCK_C)
    c = tl.program_id(1) * BLOCK_C + lane_c
    loaded = load_norm(norm, c, channels)
    weight += (tl.program_id(1) * KERNEL * KERNEL * BLOCK_C + lane_c)[None, :]
    n, top, left = strip_corners(tl.program_id(0), images, rows, COLUMNS, BLOCK_P)
    outputs = zeros(REACH * COLUMNS, BLOCK_P, BLOCK_C)
    center = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    distance = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in range(rows + REACH - 1):
        outputs = take_step(
            outputs, x, weight, n, (top + step) * STRIDE - pad_h, left * STRIDE - pad_w, norm, loaded, inputs,
            c, channels, KERNEL, STRIDE, REACH, COLUMNS, BLOCK_C,
        )  # fmt: skip
        row = top + step - (REACH - 1)
        complete = outputs[(REACH - 1) * COLUMNS :]
        center = tl.where(step == REACH - 1, complete[0], center)
        pointers = row_pointers(y, n, row, left, images, c, channels)
        in_row = row_mask(n, row, images, c, channels) & (step >= REACH - 1)
        for t in tl.static_range(COLUMNS):
            inside = in_row & column_mask(left + t, images)
            tl.store(pointers + t * channels, complete[t].to(y.dtype.element_ty), mask=inside)
            from_center = tl.where(inside, complete[t] - center, 0.0)
            distance += from_center
            square += from_center * from_center
        outputs = zeros(COLUMNS, BLOCK_P, BLOCK_C) + outputs[: (REACH - 1) * COLUMNS]
    count = tl.minimum(rows, images.height - top) * tl.minimum(COLUMNS, images.width - left)
    store_moments(partials, center, distance, square, tl.where(n < images.count, count, 0), c, channels)


@triton.jit
def dwconv_affine_kernel(
    x, weight, in_norm, norm, z, partials, inputs, images, rows, pad_h, pad_w, groups, GROUP: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """z, and its sum over each strip: partials [strips, C]."""
    REACH: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    channels = groups * GROUP
    lane_c = tl.arange(0, BLOCK_C)
    c = tl.program_id(1) * BLOCK_C + lane_c
    in_loaded = load_norm(in_norm, c, channels)
    norm = load_norm(norm, c, channels)
    weight += (tl.program_id(1) * KERNEL * KERNEL * BLOCK_C + lane_c)[None, :]
    n, top, left = strip_corners(tl.program_id(0), images, rows, COLUMNS, BLOCK_P)
    outputs = zeros(REACH * COLUMNS, BLOCK_P, BLOCK_C)
    pooled = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in range(rows + REACH - 1):
        outputs = take_step(
            outputs, x, weight, n, (top + step) * STRIDE - pad_h, left * STRIDE - pad_w, in_norm, in_loaded, inputs,
            c, channels, KERNEL, STRIDE, REACH, COLUMNS, BLOCK_C,
        )  # fmt: skip
        row = top + step - (REACH - 1)
        complete = outputs[(REACH - 1) * COLUMNS :]
        pointers = row_pointers(z, n, row, left, images, c, channels)
        in_row = row_mask(n, row, images, c, channels) & (step >= REACH - 1)
        for t in tl.static_range(COLUMNS):
            inside = in_row & column_mask(left + t, images)
            value = silu(complete[t] * norm.scale + norm.shift)
            tl.store(pointers + t * channels, value.to(z.dtype.element_ty), mask=inside)
            pooled += tl.where(inside, value, 0.0)
        outputs = zeros(COLUMNS, BLOCK_P, BLOCK_C) + outputs[: (REACH - 1) * COLUMNS]
    strip = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = (n < images.count)[:, None] & (c < channels)[None, :]
    tl.store(partials + (strip * channels)[:, None] + c[None, :], pooled, mask=exists)


def dwconv_stats(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, stride: int, same: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_activation(x, "x")
    check_window(x, weight, stride)
    check_operands(x, scale=scale, shift=shift)
    y = convolution_output(x, weight, stride, same)
    n, channels, out_h, out_w = y.shape
    if y.numel() == 0:
        return y, x.new_zeros(channels, dtype=torch.float32), x.new_zeros(channels, dtype=torch.float32)
    kernel = weight.shape[-1]
    config = depthwise_config("dwconv_stats", kernel, stride, x)
    across, strips = triton.cdiv(channels, config.channels), triton.cdiv(out_w, config.columns)
    rows = strip_rows(out_h, triton.cdiv(n * strips, config.lanes) * across)
    programs = triton.cdiv(n * triton.cdiv(out_h, rows) * strips, config.lanes)
    partials = empty_floats(x, programs, 3, channels)
    dwconv_stats_kernel[(programs, across)](
        x, pack_weight(weight, config.channels), Norm(scale, shift), y, partials,
        Images(n, *x.shape[2:]), Images(n, out_h, out_w), rows, *padding(x, kernel, stride, same), *group(channels),
        KERNEL=kernel, STRIDE=stride, COLUMNS=config.columns, **config.tile(),
    )  # fmt: skip
    mean, m2 = merge_moments(partials)
    return y, mean, m2


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
    check_activation(x, "x")
    check_window(x, weight, stride)
    check_operands(x, in_scale=in_scale, in_shift=in_shift, scale=scale, shift=shift)
    z = convolution_output(x, weight, stride, same)
    n, channels, out_h, out_w = z.shape
    if z.numel() == 0:
        return z, x.new_zeros(n, channels, dtype=torch.float32)
    kernel = weight.shape[-1]
    config = depthwise_config("dwconv_affine", kernel, stride, x)
    across, strips = triton.cdiv(channels, config.channels), triton.cdiv(out_w, config.columns)
    rows = strip_rows(out_h, triton.cdiv(n * strips, config.lanes) * across)
    strips *= triton.cdiv(out_h, rows)
    partials = empty_floats(x, n, strips, channels)
    dwconv_affine_kernel[(triton.cdiv(n * strips, config.lanes), across)](
        x, pack_weight(weight, config.channels), Norm(in_scale, in_shift), Norm(scale, shift), z, partials,
        Images(n, *x.shape[2:]), Images(n, out_h, out_w), rows, *padding(x, kernel, stride, same), *group(channels),
        KERNEL=kernel, STRIDE=stride, COLUMNS=config.columns, **config.tile(),
    )  # fmt: skip
    return z, sum_partials(partials)
