"""Depthwise convolution, backward: the gradients of its input and of its weight in one sweep.

With h = oh * stride - pad + kh, and the same for columns,

    da[h, w]         = sum over kh, kw of dy[oh, ow] * weight[kh, kw]
    dweight[kh, kw]  = sum over h, w   of dy[oh, ow] * a[h, w]

where a is the convolution's input and dy its output's gradient. Both run over the same pairs of pixels.

A lane owns a strip of the input and walks down it. It holds a window of dy: the REACH = ceil(KERNEL / STRIDE) rows that
meet the input's row at hand. At every step one row of dy comes in at the window's bottom and one leaves at its top, so
that each pixel of dy is formed from (grad, y) once per strip; the products of the window with the input's pixels are
then complete for da, and are added to the lane's own sums for dweight.

With stride 2 the window meets two rows and two columns of the input at once: a cell of STRIDE x STRIDE pixels, one for
every phase of the kernel. Strips are measured in cells.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_fast.passes.schema import dwconv_output, empty_like_nhwc
from effnet_fast.passes.triton.arithmetic import Norm, OutputGrad, load_norm, load_output_grad, output_grad, zeros
from effnet_fast.passes.triton.launch import (
    PROGRAMS,
    check_activation,
    check_like,
    check_operands,
    check_window,
    depthwise_config,
    empty_floats,
    group,
    pack_weight,
    padding,
    strip_rows,
)
from effnet_fast.passes.triton.reductions import sum_partials
from effnet_fast.passes.triton.strips import Images, column_mask, row_mask, row_pointers, strip_corners


@triton.jit
def load_output_grad_row(grad, y, op, n, row, left, images, c, channels, WIDTH: tl.constexpr):
    """A row of the window: dy at `row` and the columns from `left` on, zero outside of the image."""
    grad = row_pointers(grad, n, row, left, images, c, channels)
    if op.scale is not None:
        y = row_pointers(y, n, row, left, images, c, channels)
    in_row = row_mask(n, row, images, c, channels)
    pixels = ()
    for i in tl.static_range(WIDTH):
        inside = in_row & column_mask(left + i, images)
        dy = tl.load(grad + i * channels, mask=inside, other=0.0).to(tl.float32)
        if op.scale is not None:
            value = tl.load(y + i * channels, mask=inside, other=0.0).to(tl.float32)
            dy = tl.where(inside, output_grad(dy, value, op, True), 0.0)
        pixels += (dy,)
    return pixels


@triton.jit
def activate(value, inside, norm):
    """The convolution's input, and the slope of its activation (1 without one)."""
    if norm.scale is None:
        return value, 1.0
    else:
        u = value * norm.scale + norm.shift
        s = tl.sigmoid(u)
        return tl.where(inside, u * s, 0.0), s * (1 + u * (1 - s))


@triton.jit
def backward_dwconv_kernel(
    grad, y, x, weight, op, norm, g, partials, outputs, inputs, cells, rows, pad_h, pad_w, tiles, tiles_per_program,
    groups, GROUP: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """g, and each program's dweight and, with a norm, sums of g and g * hat: partials [programs, KERNEL^2 + 2, C]."""
    REACH: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    WIDTH: tl.constexpr = COLUMNS + REACH - 1
    channels = groups * GROUP
    lane_c = tl.arange(0, BLOCK_C)
    c = tl.program_id(1) * BLOCK_C + lane_c
    norm = load_norm(norm, c, channels)
    weight += (tl.program_id(1) * KERNEL * KERNEL * BLOCK_C + lane_c)[None, :]
    dweight = zeros(KERNEL * KERNEL, BLOCK_P, BLOCK_C)
    sum_g = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_g_hat = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    first = tl.program_id(0) * tiles_per_program
    for tile in range(first, tl.minimum(first + tiles_per_program, tiles)):
        n, top, left = strip_corners(tile, cells, rows, COLUMNS, BLOCK_P)
        out_op = load_output_grad(op, n, c, channels, cells.count)
        # Cell (i, j) begins at the input's pixel (i * STRIDE - pad % STRIDE, ...); dy's pixel (i + pad // STRIDE, ...)
        # is the last one to meet it, the first one lies REACH - 1 before.
        out_top = top + pad_h // STRIDE - (REACH - 1)
        out_left = left + pad_w // STRIDE - (REACH - 1)
        window = zeros(REACH * WIDTH, BLOCK_P, BLOCK_C)  # the lowest row first
        for step in range(REACH - 1):
            row = load_output_grad_row(grad, y, out_op, n, out_top + step, out_left, outputs, c, channels, WIDTH)
            window = row + window[: (REACH - 1) * WIDTH]
        for step in range(rows):
            row = load_output_grad_row(
                grad, y, out_op, n, out_top + REACH - 1 + step, out_left, outputs, c, channels, WIDTH
            )  # fmt: skip
            window = row + window[: (REACH - 1) * WIDTH]
            for phase_h in tl.static_range(STRIDE):
                h = (top + step) * STRIDE - pad_h % STRIDE + phase_h
                w = left * STRIDE - pad_w % STRIDE
                xs = row_pointers(x, n, h, w, inputs, c, channels)
                gs = row_pointers(g, n, h, w, inputs, c, channels)
                in_row = row_mask(n, h, inputs, c, channels)
                for phase_w in tl.static_range(STRIDE):
                    values = ()
                    activated = ()
                    slopes = ()
                    for t in tl.static_range(COLUMNS):
                        inside = in_row & column_mask(w + t * STRIDE + phase_w, inputs)
                        value = tl.load(xs + (t * STRIDE + phase_w) * channels, mask=inside, other=0.0).to(tl.float32)
                        a, slope = activate(value, inside, norm)
                        values += (value,)
                        activated += (a,)
                        slopes += (slope,)
                    da = zeros(COLUMNS, BLOCK_P, BLOCK_C)
                    # Each sum is taken from the front of its tuple and put at the back: after all taps the order is
                    # again that of these loops.
                    for j in tl.static_range(REACH):
                        for i in tl.static_range(REACH):
                            if phase_h + STRIDE * j < KERNEL and phase_w + STRIDE * i < KERNEL:
                                tap = tl.load(
                                    weight + ((phase_h + STRIDE * j) * KERNEL + phase_w + STRIDE * i) * BLOCK_C
                                )
                                products = dweight[0]
                                for t in tl.static_range(COLUMNS):
                                    dy = window[j * WIDTH + t + REACH - 1 - i]
                                    da = da[1:] + (da[0] + dy * tap,)
                                    products += dy * activated[t]
                                dweight = dweight[1:] + (products,)
                    for t in tl.static_range(COLUMNS):
                        inside = in_row & column_mask(w + t * STRIDE + phase_w, inputs)
                        stored = (da[t] * slopes[t]).to(g.dtype.element_ty)
                        tl.store(gs + (t * STRIDE + phase_w) * channels, stored, mask=inside)
                        if norm.scale is not None:
                            wide = tl.where(inside, stored.to(tl.float32), 0.0)
                            sum_g += wide
                            sum_g_hat += wide * (values[t] - norm.mean) * norm.rstd
    partials += tl.program_id(0).to(tl.int64) * (KERNEL * KERNEL + 2) * channels + c
    for phase_h in tl.static_range(STRIDE):
        for phase_w in tl.static_range(STRIDE):
            for j in tl.static_range(REACH):
                for i in tl.static_range(REACH):
                    if phase_h + STRIDE * j < KERNEL and phase_w + STRIDE * i < KERNEL:
                        to = partials + ((phase_h + STRIDE * j) * KERNEL + phase_w + STRIDE * i) * channels
                        tl.store(to, tl.sum(dweight[0], 0), mask=c < channels)
                        dweight = dweight[1:] + (dweight[0],)
    tl.store(partials + KERNEL * KERNEL * channels, tl.sum(sum_g, 0), mask=c < channels)
    tl.store(partials + (KERNEL * KERNEL + 1) * channels, tl.sum(sum_g_hat, 0), mask=c < channels)


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
    check_like(grad, "grad", dwconv_output(x.to("meta"), weight, stride, same), "the convolution's output")
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
    config = depthwise_config("backward", kernel, stride, x)
    pad_h, pad_w = padding(x, kernel, stride, same)
    cells_h, cells_w = triton.cdiv(height + pad_h % stride, stride), triton.cdiv(width + pad_w % stride, stride)
    rows = strip_rows(cells_h)
    across = triton.cdiv(channels, config.channels)
    tiles = triton.cdiv(n * triton.cdiv(cells_h, rows) * triton.cdiv(cells_w, config.columns), config.lanes)
    tiles_per_program = triton.cdiv(tiles, max(1, PROGRAMS // across))
    programs = triton.cdiv(tiles, tiles_per_program)
    taps = kernel * kernel
    partials = empty_floats(x, 1, programs, (taps + 2) * channels)
    backward_dwconv_kernel[(programs, across)](
        grad, y, x, pack_weight(weight, config.channels), OutputGrad(scale, shift, mean, gate, pooled_grad, a, b),
        Norm(in_scale, in_shift, in_mean, in_rstd), g, partials,
        Images(n, *grad.shape[2:]), Images(n, height, width), Images(n, cells_h, cells_w), rows, pad_h, pad_w,
        tiles, tiles_per_program, *group(channels), KERNEL=kernel, STRIDE=stride, **config.meta(),
    )  # fmt: skip
    totals = sum_partials(partials).view(taps + 2, channels)
    return g, totals[:taps].T.contiguous().view(weight.shape), totals[taps:].clone()
