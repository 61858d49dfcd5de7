"""Every pass but `backward_dwconv` in Triton's interpreter against float64. Run by test_interpreted.py."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_fast.passes.triton import configs, depthwise, pointwise
from effnet_fast.passes.triton.strips import Images, row_pointers
from tests.passes.samples import activation, elementwise_calls
from tests.triton.interpreter import DTYPES, check, fix_interpreter
from tests.triton.samples import WINDOWS, call_of, samples

fix_interpreter()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", samples(), ids=str)
def test_pointwise_passes(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for call in elementwise_calls(shape, dtype):
        check(call, dtype)


@pytest.mark.parametrize("name", ["dwconv_stats", "dwconv_affine"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "stride"), WINDOWS)
@pytest.mark.parametrize("shape", samples(), ids=str)
def test_convolutions(
    shape: tuple[int, int, int, int], kernel: int, stride: int, dtype: torch.dtype, name: str, wide_tiles: None
) -> None:
    check(call_of(name, shape, dtype, kernel, stride), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "stride"), WINDOWS)
def test_convolutions_with_the_launched_tiles(kernel: int, stride: int, dtype: torch.dtype) -> None:
    check(call_of("dwconv_stats", (2, 72, 5, 11), dtype, kernel, stride), dtype)


@pytest.mark.parametrize("mean_over_std", [0, 1, 1e2, 1e3])
def test_statistics_survive_a_large_mean(mean_over_std: float) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 16, 19, 23, generator=g) + mean_over_std
    x = x.contiguous(memory_format=torch.channels_last)
    identity = torch.zeros(16, 1, 3, 3)
    identity[:, 0, 1, 1] = 1
    for mean, m2 in (
        pointwise.channel_stats(x),
        depthwise.dwconv_stats(x, identity, None, None, 1, False)[1:],
    ):
        torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
        variance = x.double().var((0, 2, 3), unbiased=False)
        # as good as two passes in float32: the values' own distance from their mean is exact to 6e-8 of the mean
        torch.testing.assert_close(m2.double() / (4 * 19 * 23), variance, rtol=1e-5, atol=0)


def test_many_programs_and_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of few lanes: every program loops, and has many partial results to add."""
    monkeypatch.setattr(pointwise, "PROGRAMS", 6)
    monkeypatch.setattr(configs, "POINTWISE", {4: configs.Config(4, 16)})
    for call in elementwise_calls((2, 24, 9, 7), torch.float32):
        check(call, torch.float32)


def test_nothing_given_is_modified() -> None:
    for call in elementwise_calls((2, 24, 5, 5), torch.float32):
        before = [a.clone() if isinstance(a, Tensor) else a for a in call.args]
        getattr(pointwise, call.name)(*call.args)
        assert all(torch.equal(a, b) for a, b in zip(call.args, before, strict=True) if isinstance(a, Tensor))


def test_infinities_and_nan_stay_where_they_are() -> None:
    x = activation(torch.Generator().manual_seed(0), (1, 16, 6, 6), torch.bfloat16)
    x[0, 3, 2, 2], x[0, 5, 0, 0] = float("nan"), float("inf")
    y, mean, _ = depthwise.dwconv_stats(x, torch.ones(16, 1, 3, 3), None, None, 1, False)
    assert y[0, 3].isnan().sum() == 9
    assert mean.isfinite().tolist() == [c not in (3, 5) for c in range(16)]


@triton.jit
def _offsets_kernel(pointer, out, row, width, channels):
    images = Images(1, row + 1, width)
    lane = tl.arange(0, 1)
    pointers = row_pointers(pointer, lane * 0, row, lane * 0, images, lane, channels)
    tl.store(out + lane[:, None], pointers.to(tl.int64))


def test_offsets_past_32_bits() -> None:
    """The last row of an image of 2^33 values: 16 GiB of bfloat16 that need not exist to be pointed into."""
    x, out = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)
    for i, row in enumerate((0, 2**15)):
        _offsets_kernel[(1,)](x, out[i:], row, 2**13, 2**5)
    assert out[1] - out[0] == 2 * 2**33


WRONG = [
    (lambda x, v: pointwise.channel_stats(x[0]), "x: got 3 dimensions"),
    (lambda x, v: pointwise.channel_stats(x.contiguous()), "x: must be contiguous in channels_last"),
    (lambda x, v: pointwise.channel_stats(x.double()), "x: got torch.float64"),
    (lambda x, v: pointwise.pool(x, v.double(), v, True), "scale: got torch.float64"),
    (lambda x, v: pointwise.apply(x, v, v, True, v, None), r"gate: got torch.float32 \(16,\)"),
    (lambda x, v: pointwise.apply(x, v, v, True, None, x[:1]), "residual: got"),
    (lambda x, v: pointwise.backward_sums(x.bfloat16(), x, v, v, v, v, True), "grad: got torch.bfloat16"),
    (
        lambda x, v: depthwise.dwconv_stats(x, torch.ones(16, 1, 4, 4), None, None, 1, False),
        "weight: got a kernel of 4",
    ),
    (lambda x, v: depthwise.dwconv_stats(x, torch.ones(8, 1, 3, 3), None, None, 1, False), "weight: got shape"),
    (lambda x, v: depthwise.dwconv_stats(x, torch.ones(16, 1, 3, 3), None, None, 3, False), "stride: got 3"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_arguments_are_named(call, message: str) -> None:
    x = torch.zeros(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=message) as error:
        call(x, torch.ones(16))
    assert "\n" not in str(error.value)
