"""The compiled passes against the reference in float64, on every instruction set that this processor runs."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import effnet_fast.passes.backend  # noqa: F401 loads the compiled passes
from effnet_fast import _host
from effnet_fast.passes.backend import passes_for
from effnet_fast.passes.schema import ALGEBRA, PASSES, PRODUCTS, SWEEPS
from tests.passes.samples import (
    CONVOLUTIONS,
    OUT_CHANNELS,
    SHAPES,
    Call,
    activation,
    algebra_calls,
    channels_last,
    depthwise_calls,
    elementwise_calls,
    product_calls,
    sweep_calls,
)

# Relative to the largest value of an output. float32: some hundred roundings of 6e-8. 16 bit: the storage's rounding of
# an activation (2^-9 and 2^-12 of it) and the sigmoid's 8e-5, which the sums average out.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
# Where the processor multiplies bf16, both operands of a product or a convolution are rounded before it, by 2^-9 each.
PRODUCT_TOLERANCE = {**TOLERANCE, torch.bfloat16: 1e-2}
# A depthwise convolution has few products, which may cancel, and so may the images' parts of a bias' gradient: their
# rounding is relative to more than their sum.
CANCELLING_TOLERANCE = {**TOLERANCE, torch.bfloat16: 2e-2}
# Gradients through a BatchNorm that is swept are differences of sums over all pixels, thousands of terms of 6e-8 each.
SWEPT_TOLERANCE = {**CANCELLING_TOLERANCE, torch.float32: 5e-5}
DTYPES = tuple(TOLERANCE)


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def check(call: Call, dtype: torch.dtype) -> None:
    actual = tensors(getattr(torch.ops.effnet_fast, call.name)(*call.args))
    wide = call.to_float64()
    expected = tensors(getattr(passes_for(wide[0]), call.name)(*wide))
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape
        is_weight = call.name in ("backward_dwconv", "backward_pointwise") and i == 1
        is_weight |= call.name == "squeeze_gate_grad" or (call.name == "backward_expand_dwconv" and i > 0)
        assert a.dtype == (dtype if a.dim() == 4 and not is_weight else torch.float32)
        if a.dim() == 4 and not is_weight:
            assert a.is_contiguous(memory_format=torch.channels_last) or a.numel() == 0
        assert a.isfinite().all()
        tolerance = (PRODUCT_TOLERANCE if call.name in PRODUCTS else TOLERANCE)[dtype]
        if "dwconv" in call.name or "squeeze" in call.name:
            tolerance = CANCELLING_TOLERANCE[dtype]
        largest = e.abs().max().item() if e.numel() else 0.0
        if call.name in ("backward_dwconv", "backward_pointwise") and i == 2 and expected[0].numel():
            # sums of the gradient as rounded, times values of up to 3: they may cancel, the rounding does not
            largest = max(largest, 3 * expected[0].abs().max().item())
        if call.name == "backward_expand_dwconv":
            # and over a single pixel nothing is left of terms as large as the BatchNorm's scale
            tolerance, largest = SWEPT_TOLERANCE[dtype], max(largest, call.args[12].max().item())
        limit = tolerance * max(1.0, largest)
        torch.testing.assert_close(a.double(), e, rtol=0, atol=limit, msg=lambda m, i=i: f"{call.name}[{i}]: {m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_elementwise_passes(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for call in elementwise_calls(shape, dtype):
        check(call, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "stride", "same"), CONVOLUTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_depthwise_passes(
    shape: tuple[int, int, int, int], kernel: int, stride: int, same: bool, dtype: torch.dtype
) -> None:
    for call in depthwise_calls(shape, dtype, kernel, stride, same):
        check(call, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_channels", OUT_CHANNELS)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 16, 37, 41)], ids=str)  # the last: several blocks and chunks an image
def test_products(shape: tuple[int, int, int, int], out_channels: int, dtype: torch.dtype) -> None:
    for call in product_calls(shape, dtype, out_channels):
        check(call, dtype)


# The last two: many strips, of several rows each (an image of 40 x 37 pixels), or of one that is wider than a strip.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "stride", "same"), CONVOLUTIONS)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 16, 40, 37), (2, 8, 4, 250)], ids=str)
def test_sweeps(shape: tuple[int, int, int, int], kernel: int, stride: int, same: bool, dtype: torch.dtype) -> None:
    for call in sweep_calls(shape, dtype, kernel, stride, same, 6 * shape[1] % 136 + 8):
        check(call, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "out_channels"), [(1304, 24), (24, 1304)])  # summed up in several parts
def test_products_of_many_channels(channels: int, out_channels: int, dtype: torch.dtype) -> None:
    for call in product_calls((2, channels, 3, 5), dtype, out_channels):
        check(call, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_do_not_see_what_a_call_before_left_in_scratch(dtype: torch.dtype) -> None:
    """Operands end with words and rows of no meaning: they must not reach a result, not even as zero times NaN."""
    lost = torch.full((2, 64, 37, 41), float("nan"), dtype=dtype)
    lost_calls = list(product_calls((2, 64, 37, 41), dtype, 104))
    calls = list(product_calls((3, 24, 5, 3), dtype, 40))
    first = [tensors(getattr(torch.ops.effnet_fast, call.name)(*call.args)) for call in calls]
    for lost_call, call, results in zip(lost_calls, calls, first, strict=True):
        args = [channels_last(lost) if isinstance(a, Tensor) and a.shape == lost.shape else a for a in lost_call.args]
        getattr(torch.ops.effnet_fast, lost_call.name)(*args)
        again = tensors(getattr(torch.ops.effnet_fast, call.name)(*call.args))
        assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
        assert all(result.isfinite().all() for result in again)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("images", [0, 1, 3, 16, 37, 127])
@pytest.mark.parametrize(
    ("channels", "squeezed"), [(8, 1), (24, 6), (40, 10), (96, 4), (136, 48), (40, 131), (1152, 288)]
)
def test_algebra_between_the_passes(images: int, channels: int, squeezed: int, dtype: torch.dtype) -> None:
    for call in algebra_calls(images, channels, squeezed, dtype):
        check(call, dtype if call.name.startswith("squeeze_gate") else torch.float32)


def test_squeeze_weights_of_16_bits() -> None:
    call = next(call for call in algebra_calls(3, 40, 10) if call.name == "squeeze_gate")
    sums, pixels, *weights, dtype = call.args
    rounded = [w.bfloat16() for w in weights]
    actual = torch.ops.effnet_fast.squeeze_gate(sums, pixels, *rounded, dtype)
    assert torch.equal(actual, torch.ops.effnet_fast.squeeze_gate(sums, pixels, *(w.float() for w in rounded), dtype))


@pytest.mark.parametrize("isa", [isa for isa in _host.supported_isas() if isa != _host.supported_isas()[0]])
def test_every_other_instruction_set(isa: str) -> None:
    """Only one is loaded in a process, so the others run the other tests of this file in processes of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not every_other", __file__],
        env={**os.environ, "EFFNET_FAST_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("mean_over_std", [0, 1, 1e2, 1e3])
def test_statistics_survive_a_large_mean(mean_over_std: float) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 16, 19, 23, generator=g) + mean_over_std
    x = x.contiguous(memory_format=torch.channels_last)
    identity = torch.zeros(16, 1, 3, 3)
    identity[:, 0, 1, 1] = 1
    for mean, m2 in (
        torch.ops.effnet_fast.channel_stats(x),
        torch.ops.effnet_fast.dwconv_stats(x, identity, None, None, 1, False)[1:],
        torch.ops.effnet_fast.pointwise_stats(x, torch.eye(16)[:, :, None, None], None, None, None)[1:],
        torch.ops.effnet_fast.expand_stats(x, torch.eye(16)[:, :, None, None])[:2],
    ):
        torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
        variance = x.double().var((0, 2, 3), unbiased=False)
        # as good as two passes in float32: the values' own distance from their mean is exact to 6e-8 of the mean
        torch.testing.assert_close(m2.double() / (4 * 19 * 23), variance, rtol=1e-5, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    calls = [
        *elementwise_calls((3, 40, 9, 6), torch.bfloat16),
        *depthwise_calls((3, 40, 9, 6), torch.bfloat16, 5, 2, False),
        *(call for call in product_calls((3, 40, 9, 6), torch.bfloat16, 24) if call.name != "backward_pointwise"),
        *(call for call in sweep_calls((3, 16, 9, 6), torch.bfloat16, 3, 1, False, 96) if "dwconv_stats" in call.name),
        *algebra_calls(16, 1152, 48),
        *algebra_calls(64, 1152, 288, torch.bfloat16),
    ]
    first = [tensors(getattr(torch.ops.effnet_fast, call.name)(*call.args)) for call in calls]
    try:
        torch.set_num_threads(threads)
        again = [tensors(getattr(torch.ops.effnet_fast, call.name)(*call.args)) for call in calls]
    finally:
        torch.set_num_threads(before)
    for results in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_infinities_and_nan_stay_where_they_are() -> None:
    x = activation(torch.Generator().manual_seed(0), (1, 16, 6, 6), torch.bfloat16)
    x[0, 3, 2, 2], x[0, 5, 0, 0] = float("nan"), float("inf")
    one, zero = torch.ones(16), torch.zeros(16)
    out = torch.ops.effnet_fast.apply(x, one, zero, True, None, None)
    assert out[0, 3, 2, 2].isnan()
    assert out[0, 5, 0, 0] == float("inf")
    out[0, 3, 2, 2] = out[0, 5, 0, 0] = 0
    assert out.isfinite().all()
    y, mean, _ = torch.ops.effnet_fast.dwconv_stats(x, torch.ones(16, 1, 3, 3), None, None, 1, False)
    assert y[0, 3, 1:4, 1:4].isnan().all()
    # pairs of bf16: the kernel's last column comes with a zero for the next one, and zero times NaN is NaN
    y[0, 3, 1:4, 0:4] = 0
    assert not y[0, 3].isnan().any()
    assert mean.isfinite().tolist() == [c not in (3, 5) for c in range(16)]


@pytest.mark.parametrize("value", [-1e4, -90.0, -20.0, 20.0, 90.0, 1e4])
def test_silu_saturates(value: float) -> None:
    x = torch.full((1, 16, 2, 2), value).contiguous(memory_format=torch.channels_last)
    out = torch.ops.effnet_fast.apply(x, torch.ones(16), torch.zeros(16), True, None, None)
    torch.testing.assert_close(out, torch.nn.functional.silu(x), rtol=1e-6, atol=1e-30)


def test_nothing_given_is_modified() -> None:
    calls = [
        *elementwise_calls((2, 24, 5, 5), torch.float32),
        *depthwise_calls((2, 24, 5, 5), torch.float32, 3, 2, True),
        *product_calls((2, 24, 5, 5), torch.float32, 16),
        *sweep_calls((2, 8, 5, 5), torch.float32, 3, 2, True, 24),
        *algebra_calls(2, 24, 6),
    ]
    for call in calls:
        before = [a.clone() if isinstance(a, Tensor) else a for a in call.args]
        getattr(torch.ops.effnet_fast, call.name)(*call.args)
        assert all(torch.equal(a, b) for a, b in zip(call.args, before, strict=True) if isinstance(a, Tensor))


WRONG = [
    (lambda x, v: ("channel_stats", (x[0],)), "x: got 3 dimensions"),
    (lambda x, v: ("channel_stats", (x[:, :7],)), "x: got 7 channels"),
    (lambda x, v: ("channel_stats", (x.contiguous(),)), "x: must be contiguous in channels_last"),
    (lambda x, v: ("channel_stats", (x.double(),)), "x: dtype must be"),
    (lambda x, v: ("pool", (x, v.double(), v, True)), "scale: must be float32"),
    (lambda x, v: ("pool", (x, v, v[:8], True)), "shift: must be contiguous with 16 channels"),
    (lambda x, v: ("apply", (x, v, v, True, v, None)), "gate: must be contiguous"),
    (lambda x, v: ("apply", (x, v, v, True, None, x[:1])), "residual: must have the shape of y"),
    (lambda x, v: ("backward_sums", (x.bfloat16(), x, v, v, v, v, True)), "grad: must have the dtype of y"),
    (lambda x, v: ("dwconv_stats", (x, torch.ones(16, 1, 4, 4), None, None, 1, False)), "weight: got a kernel of 4"),
    (lambda x, v: ("dwconv_stats", (x, torch.ones(8, 1, 3, 3), None, None, 1, False)), "weight: must be"),
    (lambda x, v: ("dwconv_stats", (x, torch.ones(16, 1, 3, 3), None, None, 3, False)), "stride: got 3"),
    (lambda x, v: ("dwconv_stats", (x, torch.ones(16, 1, 3, 3), v, None, 1, False)), "shift: must be given"),
    (lambda x, v: ("batch_norm_stats", (v, v, v[:8], v, 1e-5, 4)), "weight: must be for 16 channels"),
    (lambda x, v: ("batch_norm_stats", (v, v, torch.ones(32)[::2], v, 1e-5, 4)), "weight: must be contiguous"),
    (lambda x, v: ("batch_norm_stats", (v, v, v, torch.ones(32)[::2], 1e-5, 4)), "bias: must be contiguous"),
    (lambda x, v: ("batch_norm_grad", (torch.ones(5, 16), torch.ones(3, 2, 16), None, None, 4)), r"sums: must be \[2"),
    (
        lambda x, v: ("squeeze_gate", (torch.ones(2, 16), 4, torch.ones(4, 8), torch.ones(4), v, v, torch.float32)),
        "w_reduce: must be",
    ),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_wrong_arguments_are_named(make, message: str) -> None:
    x = torch.zeros(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    name, args = make(x, torch.ones(16))
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.effnet_fast, name)(*args)


def test_every_pass_is_sampled_and_referenced() -> None:
    sampled = {call.name for call in elementwise_calls((1, 8, 3, 3), torch.float32)}
    sampled |= {call.name for call in depthwise_calls((1, 8, 3, 3), torch.float32, 3, 1, False)}
    sampled |= {call.name for call in product_calls((1, 8, 3, 3), torch.float32, 16)}
    sampled |= {call.name for call in sweep_calls((1, 8, 3, 3), torch.float32, 3, 1, False, 16)}
    sampled |= {call.name for call in algebra_calls(1, 8, 1)}
    assert sampled == {*PASSES, *PRODUCTS, *SWEEPS, *ALGEBRA}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fakes_have_the_shapes_dtypes_and_strides_of_the_kernels(dtype: torch.dtype) -> None:
    calls = [
        *elementwise_calls((3, 40, 9, 6), dtype),
        *depthwise_calls((3, 40, 9, 6), dtype, 5, 2, True),
        *product_calls((3, 40, 9, 6), dtype, 24),
        *sweep_calls((3, 40, 9, 6), dtype, 5, 2, True, 72),
        *algebra_calls(3, 40, 10, dtype),
    ]
    for call in calls:
        overload = getattr(torch.ops.effnet_fast, call.name).default
        torch.library.opcheck(overload, call.args, test_utils=("test_schema", "test_faketensor"))
