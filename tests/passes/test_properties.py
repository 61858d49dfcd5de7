"""The compiled passes against the reference in float64, over shapes and dtypes that hypothesis draws."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.samples import depthwise_calls, elementwise_calls, product_calls
from tests.passes.test_cpu import DTYPES, check

batches = st.integers(0, 4)
channels = st.integers(1, 20).map(lambda i: 8 * i)
sizes = st.integers(1, 20)
dtypes = st.sampled_from(DTYPES)


@settings(max_examples=60, deadline=None)
@given(n=batches, c=channels, h=sizes, w=sizes, dtype=dtypes)
def test_any_elementwise_shape(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> None:
    for call in elementwise_calls((n, c, h, w), dtype):
        check(call, dtype)


@settings(max_examples=80, deadline=None)
@given(
    n=batches,
    c=channels,
    h=sizes,
    w=sizes,
    kernel=st.sampled_from([3, 5, 7]),
    stride=st.sampled_from([1, 2]),
    same=st.booleans(),
    dtype=dtypes,
)
def test_any_convolution(
    n: int, c: int, h: int, w: int, kernel: int, stride: int, same: bool, dtype: torch.dtype
) -> None:
    for call in depthwise_calls((n, c, h, w), dtype, kernel, stride, same):
        check(call, dtype)


@settings(max_examples=60, deadline=None)
@given(n=batches, c=channels, h=sizes, w=sizes, out_channels=channels, dtype=dtypes)
def test_any_product(n: int, c: int, h: int, w: int, out_channels: int, dtype: torch.dtype) -> None:
    for call in product_calls((n, c, h, w), dtype, out_channels):
        check(call, dtype)
