"""From the partial results of programs to a pass's result: in a fixed order, so that runs repeat bit for bit."""

import triton
import triton.language as tl
from torch import Tensor

from effnet_fast.passes.triton.launch import empty_floats

_BLOCK_P, _BLOCK_C = 64, 16


@triton.jit
def store_moments(partials, center, distance, square, count, c, channels):
    """A program's number of values, their mean and m2, into its place of partials [programs, 3, C].

    distance, square [BLOCK_P, BLOCK_C]: each lane's sums of value - center and of its square, over count [BLOCK_P]
    values. As center is one of the lane's own values, a large mean does not cancel in the squares.
    """
    weight = count.to(tl.float32)[:, None]
    total = tl.sum(weight)
    offset = distance / tl.maximum(weight, 1.0)  # the lane's mean is center + offset
    mean = tl.sum((center + offset) * weight, 0) / total
    around = center - mean[None, :] + offset
    correction = tl.sum(around * weight, 0) / total  # what rounding a large mean lost
    m2 = tl.sum(square - distance * offset + weight * around * around, 0) - total * correction * correction
    partials += tl.program_id(0).to(tl.int64) * 3 * channels + c
    tl.store(partials, tl.zeros_like(mean) + total, mask=c < channels)
    tl.store(partials + channels, mean + correction, mask=c < channels)
    tl.store(partials + 2 * channels, m2, mask=c < channels)


@triton.jit
def merge_moments_kernel(partials, mean_out, m2_out, count, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = (c < channels)[None, :]
    first = tl.load(partials + channels + c, mask=c < channels, other=0.0)[None, :]
    lane = tl.arange(0, BLOCK_P).to(tl.int64)
    weights = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    offsets = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_P):
        mask = (start + lane < count)[:, None] & exists
        at = partials + ((start + lane) * 3 * channels)[:, None] + c[None, :]
        weight = tl.load(at, mask=mask, other=0.0)
        weights += weight
        offsets += weight * (tl.load(at + channels, mask=mask, other=0.0) - first)
    mean = first + (tl.sum(offsets, 0) / tl.maximum(tl.sum(weights, 0), 1.0))[None, :]
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_P):
        mask = (start + lane < count)[:, None] & exists
        at = partials + ((start + lane) * 3 * channels)[:, None] + c[None, :]
        around = tl.load(at + channels, mask=mask, other=0.0) - mean
        squares += tl.load(at + 2 * channels, mask=mask, other=0.0) + (
            tl.load(at, mask=mask, other=0.0) * around * around
        )
    tl.store(mean_out + c[None, :], mean, mask=exists)
    tl.store(m2_out + c, tl.sum(squares, 0), mask=c < channels)


@triton.jit
def sum_partials_kernel(partials, result, count, width, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = (c < width)[None, :]
    lane = tl.arange(0, BLOCK_P).to(tl.int64)
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_P):
        mask = (start + lane < count)[:, None] & exists
        at = partials + ((row * count + start + lane) * width)[:, None] + c[None, :]
        total += tl.load(at, mask=mask, other=0.0)
    tl.store(result + row * width + c, tl.sum(total, 0), mask=c < width)


def merge_moments(partials: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and m2 [C] of everything, from the programs' count, mean and m2: partials [programs, 3, C]."""
    count, _, channels = partials.shape
    mean, m2 = empty_floats(partials, channels), empty_floats(partials, channels)
    merge_moments_kernel[(triton.cdiv(channels, _BLOCK_C),)](
        partials, mean, m2, count, channels, BLOCK_P=_BLOCK_P, BLOCK_C=_BLOCK_C
    )
    return mean, m2


def sum_partials(partials: Tensor) -> Tensor:
    """Sums of partials [rows, count, width] over count: [rows, width]."""
    rows, count, width = partials.shape
    if count == 1:
        return partials.squeeze(1)
    result = empty_floats(partials, rows, width)
    sum_partials_kernel[(rows, triton.cdiv(width, _BLOCK_C))](
        partials, result, count, width, BLOCK_P=_BLOCK_P, BLOCK_C=_BLOCK_C
    )
    return result
