"""The CUDA passes, simulated, against the reference in float64."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from effnet_fast.passes import products, reference
from effnet_fast.passes.backend import with_products
from effnet_fast.passes.schema import ALGEBRA, PASSES
from tests.cuda_sim.conftest import FORWARD, ORDERS, RANDOM, REVERSE, Simulate
from tests.passes.samples import (
    CONVOLUTIONS,
    SHAPES,
    Call,
    algebra_calls,
    channels_last,
    depthwise_calls,
    elementwise_calls,
    product_calls,
)
from tests.passes.test_cpu import WRONG

# Relative to the largest value of an output. float32: some hundred roundings of 6e-8. 16 bit: the storage's rounding of
# an activation (2^-9 and 2^-12 of it), and sums of few such values.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
DTYPES = tuple(TOLERANCE)

# Beside the other backends' shapes: channels that no vector divides, more than one group of channels, a strip's end
MORE_SHAPES = ((2, 13, 6, 5), (1, 1, 9, 9), (2, 100, 4, 6), (1, 264, 3, 3), (1, 8, 4, 75))


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def check(passes: SimpleNamespace, call: Call, dtype: torch.dtype) -> None:
    actual = tensors(getattr(passes, call.name)(*call.args))
    expected = tensors(getattr(with_products(reference), call.name)(*call.to_float64()))
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        stored = a.dim() == 4 and not (call.name == "backward_dwconv" and i == 1)
        assert a.shape == e.shape
        assert a.dtype == (dtype if stored else torch.float32)
        assert not stored or a.is_contiguous(memory_format=torch.channels_last) or a.numel() == 0
        assert a.isfinite().all(), f"{call.name}[{i}]: not written, or computed from what was not"
        limit = TOLERANCE[dtype] * max(1.0, e.abs().max().item() if e.numel() else 0.0)
        torch.testing.assert_close(a.double(), e, rtol=0, atol=limit, msg=lambda m, i=i: f"{call.name}[{i}]: {m}")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + MORE_SHAPES, ids=str)
def test_pointwise_passes(passes: SimpleNamespace, simulate: Simulate, shape, dtype: torch.dtype, order: int) -> None:
    simulate(order, 1)
    for call in elementwise_calls(shape, dtype):
        check(passes, call, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "stride", "same"), CONVOLUTIONS)
@pytest.mark.parametrize("shape", SHAPES + MORE_SHAPES, ids=str)
def test_depthwise_passes(
    passes: SimpleNamespace, simulate: Simulate, shape, kernel: int, stride: int, same: bool, dtype: torch.dtype
) -> None:
    # three orders in turn; all of them for the smallest storage and every kernel below
    simulate(ORDERS[(sum(shape) + kernel + stride + same) % 3], 1)
    for call in depthwise_calls(shape, dtype, kernel, stride, same):
        check(passes, call, dtype)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("kernel", "stride", "same"), CONVOLUTIONS)
@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
def test_however_the_work_is_cut(
    passes: SimpleNamespace, simulate: Simulate, multiprocessors: int, kernel: int, stride: int, same: bool, order: int
) -> None:
    """From few blocks that take many tiles each to images in chunks and segments."""
    simulate(order, multiprocessors)
    shape = (3, 40, 19, 7)
    for call in [
        *elementwise_calls(shape, torch.float32),
        *depthwise_calls(shape, torch.float32, kernel, stride, same),
    ]:
        check(passes, call, torch.float32)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("images", "channels", "squeezed"), [(2, 32, 8), (0, 16, 4), (1, 8, 1), (5, 13, 3), (40, 96, 24), (3, 300, 40)]
)
def test_algebra_between_the_passes(
    passes: SimpleNamespace, simulate: Simulate, images: int, channels: int, squeezed: int, order: int
) -> None:
    simulate(order, 1)
    for call in algebra_calls(images, channels, squeezed):
        check(passes, call, torch.float32)


def test_weights_in_16_bits(passes: SimpleNamespace) -> None:
    """Of a model that is in 16 bits as a whole."""
    for call in algebra_calls(3, 40, 10):
        first = {"batch_norm_stats": 2, "squeeze_gate": 2, "squeeze_gate_grad": 3}.get(call.name)
        if first is not None:
            args = [a.bfloat16() if isinstance(a, Tensor) and i >= first else a for i, a in enumerate(call.args)]
            check(passes, Call(call.name, tuple(args)), torch.float32)


def test_many_partial_results(passes: SimpleNamespace, simulate: Simulate) -> None:
    """More than 64 of each, which more threads add up."""
    simulate(RANDOM, 132)
    for call in elementwise_calls((1, 13, 100, 100), torch.float32):
        check(passes, call, torch.float32)


# Both operands of a product are rounded before it, and its result.
PRODUCT_TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("without_dy", [0, products.WITHOUT_DY])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 9, 7), (3, 40, 4, 6)], ids=str)
def test_products_composed_of_them(
    passes: SimpleNamespace, simulate: Simulate, shape, dtype: torch.dtype, without_dy: int, monkeypatch
) -> None:
    simulate(FORWARD, 2)
    composed, expected = with_products(passes), with_products(reference)
    for call in product_calls(shape, dtype, 48):
        with monkeypatch.context() as patch:  # what is expected takes dy's way
            patch.setattr(products, "WITHOUT_DY", without_dy)
            results = tensors(getattr(composed, call.name)(*call.args))
        wide = tensors(getattr(expected, call.name)(*call.to_float64()))
        for a, e in zip(results, wide, strict=True):
            limit = PRODUCT_TOLERANCE[dtype] * max(1.0, e.abs().max().item() if e.numel() else 0.0)
            torch.testing.assert_close(a.double(), e, rtol=0, atol=limit)


def test_every_pass_is_sampled() -> None:
    calls = [
        *elementwise_calls((1, 8, 3, 3), torch.float32),
        *depthwise_calls((1, 8, 3, 3), torch.float32, 3, 1, False),
        *algebra_calls(1, 8, 1),
    ]
    assert {call.name for call in calls} == {*PASSES, *ALGEBRA}


@pytest.mark.parametrize("order", [REVERSE, RANDOM])
def test_results_do_not_depend_on_the_order_of_threads(passes: SimpleNamespace, simulate: Simulate, order: int) -> None:
    shape = (2, 24, 9, 6)
    for call in [
        *elementwise_calls(shape, torch.bfloat16),
        *depthwise_calls(shape, torch.bfloat16, 5, 2, False),
        *algebra_calls(9, 40, 10),
    ]:
        results = []
        for turns in (FORWARD, order):
            simulate(turns, 2)
            results.append(tensors(getattr(passes, call.name)(*call.args)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mean_over_std", [0, 1e3])
def test_statistics_survive_a_large_mean(passes: SimpleNamespace, simulate: Simulate, mean_over_std: float) -> None:
    simulate(FORWARD, 2)
    x = channels_last(torch.randn(4, 16, 19, 23, generator=torch.Generator().manual_seed(0)) + mean_over_std)
    identity = torch.zeros(16, 1, 3, 3)
    identity[:, 0, 1, 1] = 1
    for mean, m2 in (passes.channel_stats(x), passes.dwconv_stats(x, identity, None, None, 1, False)[1:]):
        torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
        variance = x.double().var((0, 2, 3), unbiased=False)
        # as good as two passes in float32: the values' own distance from their mean is exact to 6e-8 of the mean
        torch.testing.assert_close(m2.double() / (4 * 19 * 23), variance, rtol=1e-5, atol=0)


def test_unaligned_activations_take_the_scalar_path(passes: SimpleNamespace, simulate: Simulate) -> None:
    simulate(FORWARD, 1)
    shape = (2, 16, 5, 6)

    def moved(value: object) -> object:
        if not isinstance(value, Tensor) or value.dim() != 4 or value.dtype != torch.bfloat16:
            return value
        n, c, h, w = value.shape
        room = torch.zeros(value.numel() + 1, dtype=value.dtype)
        view = room[1:].view(n, h, w, c).permute(0, 3, 1, 2)
        assert view.data_ptr() % 16 == 2
        return view.copy_(value)

    for call in [*elementwise_calls(shape, torch.bfloat16), *depthwise_calls(shape, torch.bfloat16, 3, 1, False)]:
        check(passes, Call(call.name, tuple(map(moved, call.args))), torch.bfloat16)


def test_offsets_past_32_bits(passes: SimpleNamespace, simulate: Simulate, simulator: ctypes.CDLL) -> None:
    """The last blocks of 33 images of 2^26 values: 4 GiB of bfloat16, of which only the end is touched."""
    torch.use_deterministic_algorithms(False)  # would fill what is allocated
    simulate(FORWARD, 10_000)
    n, c, h, w = 33, 8, 2048, 4096
    x = torch.empty(n, h, w, c, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    assert x[:-1].numel() >= 2**31
    g = torch.Generator().manual_seed(0)
    corner = torch.randn(1, c, 24, 48, generator=g).bfloat16()
    x[-1:, :, -24:, -48:] = corner
    v, weight = torch.rand(c, generator=g), torch.randn(c, 1, 3, 3, generator=g)
    norm, wide = (v, v, v, v), channels_last(corner.double())
    v64, weight64 = v.double(), weight.double()
    simulator.run_last_blocks(64)
    try:
        actual = [
            passes.apply(x, v, v, True, None, x),
            passes.backward_apply(x, x, v, v, v, True, None, None, v, v),
            passes.dwconv_stats(x, weight, v, v, 1, False)[0],
            passes.dwconv_affine(x, weight, None, None, v, v, 1, False)[0],
            passes.backward_dwconv(x, x, x, weight, v, v, v, None, None, v, v, *norm, 1, False)[0],
        ]
    finally:
        simulator.run_last_blocks(2**31 - 1)  # all that a launch may have
    norm = (v64,) * 4
    expected = [
        reference.apply(wide, v64, v64, True, None, wide),
        reference.backward_apply(wide, wide, v64, v64, v64, True, None, None, v64, v64),
        reference.dwconv_stats(wide, weight64, v64, v64, 1, False)[0],
        reference.dwconv_affine(wide, weight64, None, None, v64, v64, 1, False)[0],
        reference.backward_dwconv(wide, wide, wide, weight64, *(v64,) * 3, None, None, v64, v64, *norm, 1, False)[0],
    ]
    for a, e in zip(actual, expected, strict=True):
        limit = TOLERANCE[torch.bfloat16] * e.abs().max().item()
        # the corner's upper and left edges are not the image's
        torch.testing.assert_close(a[-1:, :, -22:, -46:].double(), e[:, :, 2:, 2:], rtol=0, atol=limit)


X, ONES = channels_last(torch.zeros(2, 16, 4, 4)), torch.ones(16)


@pytest.mark.parametrize(
    ("make", "message"),
    # any number of channels will do here
    [case for case in WRONG if case[0](X, ONES)[0] in PASSES + ALGEBRA and "7 channels" not in case[1]],
)
def test_wrong_arguments_are_named(passes: SimpleNamespace, make, message: str) -> None:
    name, args = make(X, ONES)
    with pytest.raises(RuntimeError, match=message):
        getattr(passes, name)(*args)


def test_a_launch_that_no_gpu_takes_and_parting_threads_are_refused(simulator) -> None:
    """The simulator itself: barriers that only some threads reach, and more threads than a block may have."""
    assert simulator.parting_threads() == 1
    assert simulator.too_many_threads() == 1
