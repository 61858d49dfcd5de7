"""How the depthwise kernels cut an activation: each lane of a tile walks down a strip of one image."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Images(NamedTuple):
    """The size of an activation."""

    count: Any
    height: Any
    width: Any


@triton.jit
def strip_corners(tile, images, rows, COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Image, first row and first column of a tile's strips of `rows` by COLUMNS pixels, [BLOCK_P] each.

    Lanes past the last strip have n = images.count. Lanes next to each other walk next to each other, so that the
    columns which both of them read come from the cache.
    """
    across = tl.cdiv(images.width, COLUMNS)
    down = tl.cdiv(images.height, rows)
    strip = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    return strip // (across * down), strip // across % down * rows, strip % across * COLUMNS


@triton.jit
def row_pointers(pointer, n, row, left, images, c, channels):
    """To the pixels (row, left) of NHWC memory, [BLOCK_P, BLOCK_C]. In 64 bits: large batches pass 2^31 elements."""
    pixel = (n.to(tl.int64) * images.height + row) * images.width + left
    return pointer + (pixel * channels)[:, None] + c[None, :]


@triton.jit
def row_mask(n, row, images, c, channels):
    """Whether the row is one of an image, and the channels exist, [BLOCK_P, BLOCK_C]."""
    return ((n < images.count) & (row >= 0) & (row < images.height))[:, None] & (c < channels)[None, :]


@triton.jit
def column_mask(column, images):
    """[BLOCK_P, 1]"""
    return ((column >= 0) & (column < images.width))[:, None]
