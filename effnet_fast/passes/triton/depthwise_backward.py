"""Depthwise convolution, backward: the gradients of its input and of its weight in one sweep.

With h = oh * stride - pad + kh, and the same for columns,

    da[h, w]         = sum over kh, kw of dy[oh, ow] * weight[kh, kw]
    dweight[kh, kw]  = sum over h, w   of dy[oh, ow] * a[h, w]

where a is the convolution's input and dy its output's gradient. Both run over the same pairs of pixels.

A lane owns a column of the input, or a segment of one, and walks down it. It holds a window of KERNEL rows: the
input's activated pixels, and what their gradients have gathered so far. At every step one row of dy is formed from
(grad, y), and each of its pixels meets the whole window while it is in a register, for da and for dweight. Then the
window slides down by STRIDE rows, of which the upper ones have met all that they meet.

With stride 2 a pixel of dy meets STRIDE columns of the input at once, one for every phase of the kernel: a lane's
column is one of cells, STRIDE x STRIDE pixels each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_fast.passes.schema import convolution_output, empty_like_nhwc
from effnet_fast.passes.triton.arithmetic import (
    Norm,
    OutputGrad,
    load_norm,
    load_output_grad,
    output_grad,
    silu,
    silu_slope,
    zeros,
)
from effnet_fast.passes.triton.configs import depthwise_config
from effnet_fast.passes.triton.launch import (
    PROGRAMS,
    check_activation,
    check_like,
    check_operands,
    check_window,
    empty_floats,
    group,
    pack_weight,
    padding,
    registers,
    strip_rows,
)
from effnet_fast.passes.triton.reductions import sum_partials
from effnet_fast.passes.triton.strips import Images, column_mask, row_mask, row_pointers, strip_corners


@triton.jit
def load_output_grad_pixel(grad, y, op, loaded, n, row, column, images, c, channels):
    """dy, zero outside of the image. loaded: op's values."""
    inside = row_mask(n, row, images, c, channels) & column_mask(column, images)
    dy = tl.load(row_pointers(grad, n, row, column, images, c, channels), mask=inside, other=0.0).to(tl.float32)
    if op.scale is None:
        return dy
    else:
        value = tl.load(row_pointers(y, n, row, column, images, c, channels), mask=inside, other=0.0).to(tl.float32)
        return tl.where(inside, output_grad(dy, value, op, loaded, True), 0.0)


@triton.jit
def owns(row, first, rows):
    """Whether the row is one of a strip's own, [BLOCK_P, 1]."""
    return ((row >= first) & (row < first + rows))[:, None]


@triton.jit
def backward_dwconv_kernel(
    grad, y, x, weight, op, norm, g, partials, outputs, inputs, cells, rows, pad_h, pad_w, tiles, tiles_per_program,
    groups, GROUP: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """g, and each program's dweight and, with a norm, sums of g and g * hat: partials [programs, KERNEL^2 + 2, C]."""
    REACH: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE  # rows and columns of dy that meet a cell
    channels = groups * GROUP
    lane_c = tl.arange(0, BLOCK_C)
    c = tl.program_id(1) * BLOCK_C + lane_c
    weight += (tl.program_id(1) * KERNEL * KERNEL * BLOCK_C + lane_c)[None, :]
    dweight = zeros(REACH * KERNEL * STRIDE, BLOCK_P, BLOCK_C)
    sum_g = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_g_centered = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    first = tl.program_id(0) * tiles_per_program
    for tile in range(first, tl.minimum(first + tiles_per_program, tiles)):
        n, top, left = strip_corners(tile, cells, rows, 1, BLOCK_P)
        # Cell i begins at the input's row i * STRIDE - pad % STRIDE; dy's row i + pad // STRIDE is the last to meet it.
        owned = top * STRIDE - pad_h % STRIDE
        w = left * STRIDE - pad_w % STRIDE
        activated = zeros(KERNEL * STRIDE, BLOCK_P, BLOCK_C)
        da = zeros(KERNEL * STRIDE, BLOCK_P, BLOCK_C)
        for step in range(1 - REACH, rows):
            in_norm = load_norm(
                Norm(norm.scale, norm.shift, norm.mean), c, channels
            )  # at every step: to spare registers
            h = owned + step * STRIDE  # the window's first row
            activated = activated[STRIDE * STRIDE :]
            for r in tl.static_range(KERNEL - STRIDE, KERNEL):
                xs = row_pointers(x, n, h + r, w, inputs, c, channels)
                in_row = row_mask(n, h + r, inputs, c, channels) & owns(h + r, owned, rows * STRIDE)
                for phase in tl.static_range(STRIDE):
                    inside = in_row & column_mask(w + phase, inputs)
                    value = tl.load(xs + phase * channels, mask=inside, other=0.0).to(tl.float32)
                    if norm.scale is not None:
                        value = tl.where(inside, silu(value * in_norm.scale + in_norm.shift), 0.0)
                    activated += (value,)
            da = da[STRIDE * STRIDE :] + zeros(STRIDE * STRIDE, BLOCK_P, BLOCK_C)

            out_op = load_output_grad(op, n, c, channels, cells.count)
            # What is taken from the front of a tuple is put at its back: after all taps the order is as before.
            for i in tl.static_range(REACH):
                dy = load_output_grad_pixel(
                    grad, y, op, out_op, n, top + pad_h // STRIDE + step, left + pad_w // STRIDE - i, outputs,
                    c, channels,
                )  # fmt: skip
                for kh in tl.static_range(KERNEL):
                    for phase in tl.static_range(STRIDE):
                        gathered, products = da[0], dweight[0]
                        if phase + STRIDE * i < KERNEL:
                            gathered += dy * tl.load(weight + (kh * KERNEL + phase + STRIDE * i) * BLOCK_C)
                            products += dy * activated[kh * STRIDE + phase]
                        da = da[1:] + (gathered,)
                        dweight = dweight[1:] + (products,)

            for r in tl.static_range(STRIDE):
                xs = row_pointers(x, n, h + r, w, inputs, c, channels)
                gs = row_pointers(g, n, h + r, w, inputs, c, channels)
                in_row = row_mask(n, h + r, inputs, c, channels) & owns(h + r, owned, rows * STRIDE)
                for phase in tl.static_range(STRIDE):
                    inside = in_row & column_mask(w + phase, inputs)
                    complete = da[r * STRIDE + phase]
                    if norm.scale is None:
                        tl.store(gs + phase * channels, complete.to(g.dtype.element_ty), mask=inside)
                    else:
                        value = tl.load(xs + phase * channels, mask=inside, other=0.0).to(tl.float32)
                        slope = silu_slope(value * in_norm.scale + in_norm.shift)
                        stored = (complete * slope).to(g.dtype.element_ty)
                        tl.store(gs + phase * channels, stored, mask=inside)
                        wide = tl.where(inside, stored.to(tl.float32), 0.0)
                        sum_g += wide
                        sum_g_centered += wide * (value - in_norm.mean)
    # One store: Triton's compiler would take a third of a second for as many of them as there are sums.
    ROWS: tl.constexpr = triton.next_power_of_2(KERNEL * KERNEL + 2)
    row = tl.arange(0, ROWS)[:, None]
    sums = tl.where(row == KERNEL * KERNEL, tl.sum(sum_g, 0)[None, :], tl.zeros((ROWS, BLOCK_C), tl.float32))
    if norm.scale is not None:
        sum_g_hat = tl.sum(sum_g_centered, 0) * tl.load(norm.rstd + c, mask=c < channels, other=0.0)
        sums = tl.where(row == KERNEL * KERNEL + 1, sum_g_hat[None, :], sums)
    for i in tl.static_range(REACH):
        for kh in tl.static_range(KERNEL):
            for phase in tl.static_range(STRIDE):
                if phase + STRIDE * i < KERNEL:
                    total = tl.sum(dweight[(i * KERNEL + kh) * STRIDE + phase], 0)
                    sums = tl.where(row == kh * KERNEL + phase + STRIDE * i, total[None, :], sums)
    partials += tl.program_id(0).to(tl.int64) * (KERNEL * KERNEL + 2) * channels
    inside = (row < KERNEL * KERNEL + 2) & (c < channels)[None, :]
    tl.store(partials + row * channels + c[None, :], sums, mask=inside)


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
    check_activation(x, "x")
    check_window(x, weight, stride)
    check_like(grad, "grad", convolution_output(x.to("meta"), weight, stride, same), "the convolution's output")
    if scale is not None:
        check_like(y, "y", grad, "grad")
    check_operands(x, scale=scale, shift=shift, mean=mean, gate=gate, pooled_grad=pooled_grad, a=a, b=b)
    check_operands(x, in_scale=in_scale, in_shift=in_shift, in_mean=in_mean, in_rstd=in_rstd)
    g = empty_like_nhwc(x)
    n, channels, height, width = x.shape
    kernel = weight.shape[-1]
    if x.numel() == 0:
        dweight = x.new_zeros(weight.shape, dtype=torch.float32)
        return g, dweight, x.new_zeros(2, channels, dtype=torch.float32)
    config = depthwise_config("backward_dwconv", kernel, stride, x)
    pad_h, pad_w = padding(x, kernel, stride, same)
    cells_h, cells_w = triton.cdiv(height + pad_h % stride, stride), triton.cdiv(width + pad_w % stride, stride)
    across = triton.cdiv(channels, config.channels)
    rows = strip_rows(cells_h, triton.cdiv(n * cells_w, config.lanes) * across)
    tiles = triton.cdiv(n * triton.cdiv(cells_h, rows) * cells_w, config.lanes)
    tiles_per_program = triton.cdiv(tiles, max(1, PROGRAMS // across))
    programs = triton.cdiv(tiles, tiles_per_program)
    taps = kernel * kernel
    partials = empty_floats(x, 1, programs, (taps + 2) * channels)
    backward_dwconv_kernel[(programs, across)](
        grad, y, x, pack_weight(weight, config.channels), OutputGrad(scale, shift, mean, gate, pooled_grad, a, b),
        Norm(in_scale, in_shift, in_mean, in_rstd), g, partials,
        Images(n, *grad.shape[2:]), Images(n, height, width), Images(n, cells_h, cells_w), rows, pad_h, pad_w,
        tiles, tiles_per_program, *group(channels), KERNEL=kernel, STRIDE=stride,
        **config.tile(), **registers(x),
    )  # fmt: skip
    totals = sum_partials(partials).view(taps + 2, channels)
    return g, totals[:taps].T.contiguous().view(weight.shape), totals[taps:].clone()
