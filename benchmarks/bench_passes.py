"""Every pass over B0's activations at 224 pixels, and a depthwise convolution's backward against PyTorch's own.

Rates are GB/s, each activation read or written counted once.
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import BATCH, COMPILED, DTYPES, OURS, TWIN, Call, blocks, describe, dtype_name, images
from effnet_fast.passes.backend import passes_for
from tests.passes.samples import Call as Sample
from tests.passes.samples import depthwise_calls, elementwise_calls, product_calls, sweep_calls

SECONDS = 0.4
# Both sum in float32 and round what they store once.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
# The sweeps round what their products multiply, and that is all that is left where terms cancel.
SWEPT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
# PyTorch sums the gradient of a bfloat16 weight in bfloat16.
CONVOLUTION_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}

# Of the tests' samples, the variants that an MBConv block with squeeze-excite uses, by their arguments.
ELEMENTWISE: dict[str, Callable[[Any], bool]] = {
    "channel_stats": lambda a: True,
    "pool": lambda a: a[3],
    "apply": lambda a: a[3] and a[4] is not None and a[5] is None,
    "backward_sums": lambda a: a[6],
    "backward_apply": lambda a: not a[5] and a[6] is None and a[7] is None,
}
DEPTHWISE: dict[str, Callable[[Any], bool]] = {
    "dwconv_stats": lambda a: a[2] is not None,
    "backward_dwconv": lambda a: a[7] is not None and a[11] is not None,
    "dwconv_affine": lambda a: a[2] is not None,
}
PRODUCTS: dict[str, Callable[[Any], bool]] = {
    "pointwise_stats": lambda a: a[2] is not None and a[4] is not None,
    "pointwise_affine": lambda a: not a[5] and a[2] is not None and a[6] is not None,
    "backward_pointwise": lambda a: a[4] is not None and not a[7] and a[11] is not None and a[15] is not None,
}
CONVOLUTIONS = {
    describe(block, size): (block.depthwise.conv.out_channels, size, *block.depthwise.conv.weight.shape[2:3], stride)
    for block, size in blocks()
    for stride in block.depthwise.conv.stride[:1]
}
SWEEPS: dict[str, Callable[[Any], bool]] = {
    "expand_stats": lambda a: True,
    "expand_dwconv_stats": lambda a: True,
    "backward_expand_dwconv": lambda a: a[8] is not None,
}
EXPANSIONS = {
    f"{block.expand.conv.in_channels} to {describe(block, size)}": (block, size)
    for block, size in blocks()
    if block.expand is not None
}
PROJECTIONS = {
    f"{block.project.conv.in_channels}x{size}x{size} to {block.project.conv.out_channels}": (block.project.conv, size)
    for block, input_size in blocks()
    for size in [-(-input_size // block.depthwise.conv.stride[0])]
}
ACTIVATIONS = {f"{c}x{size}x{size}": (c, size) for c, size, _, _ in CONVOLUTIONS.values()}

REFERENCE = passes_for(torch.empty(0, 8, 1, 1, dtype=torch.float64))

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
convolutions = pytest.mark.parametrize("shape", CONVOLUTIONS)


@lru_cache(maxsize=2)
def elementwise_samples(n: int, c: int, size: int, dtype: torch.dtype) -> list[Sample]:
    return list(elementwise_calls((n, c, size, size), dtype))


@lru_cache(maxsize=2)
def depthwise_samples(n: int, c: int, size: int, kernel: int, stride: int, dtype: torch.dtype) -> list[Sample]:
    return list(depthwise_calls((n, c, size, size), dtype, kernel, stride, False))


@lru_cache(maxsize=2)
def product_samples(n: int, c: int, size: int, out_channels: int, dtype: torch.dtype) -> list[Sample]:
    return list(product_calls((n, c, size, size), dtype, out_channels))


@lru_cache(maxsize=2)
def sweep_samples(n: int, shape: str, dtype: torch.dtype) -> list[Sample]:
    block, size = EXPANSIONS[shape]
    conv, (stride, _) = block.depthwise.conv, block.depthwise.conv.stride
    inputs = (n, block.expand.conv.in_channels, size, size)
    return list(sweep_calls(inputs, dtype, conv.kernel_size[0], stride, False, conv.out_channels))


@cache
def compiled(name: str) -> Callable[..., Any]:
    return torch.compile(getattr(REFERENCE, name), dynamic=True)


def tensors(result: Any) -> Sequence[Tensor]:
    return (result,) if isinstance(result, Tensor) else result


def compare(
    race: Callable[..., None],
    name: str,
    shape: str,
    sample: Callable[[int], Sample],
    dtype: torch.dtype,
    tolerance: dict[torch.dtype, float] = TOLERANCE,
) -> None:
    def make(function: Callable[..., Any], n: int) -> Call:
        args = sample(n).args
        return lambda: tensors(function(*args))

    native = getattr(torch.ops.effnet_fast, name).default
    few = sample(2).args
    moved = [t for t in (*few, *tensors(native(*few))) if isinstance(t, Tensor) and t.dim() == 4 and len(t) == 2]
    race(
        {
            OURS: partial(make, native),
            TWIN: partial(make, getattr(REFERENCE, name)),
            COMPILED: lambda n: make(compiled(name), n),
        },
        examples=BATCH,
        seconds=SECONDS,
        tolerance=tolerance[dtype],
        unit="GB/s",
        work=sum(t.nbytes for t in moved) / 2 / 1e9,
        table="Passes",
        row={"pass": name, "shape": shape, "dtype": dtype_name(dtype)},
    )


@pytest.mark.parametrize("name", ELEMENTWISE)
@dtypes
@pytest.mark.parametrize("shape", ACTIVATIONS)
def test_elementwise(race: Callable[..., None], shape: str, dtype: torch.dtype, name: str) -> None:
    def sample(n: int) -> Sample:
        return next(
            s
            for s in elementwise_samples(n, *ACTIVATIONS[shape], dtype)
            if s.name == name and ELEMENTWISE[name](s.args)
        )

    compare(race, name, shape, sample, dtype)


@pytest.mark.parametrize("name", DEPTHWISE)
@dtypes
@convolutions
def test_depthwise(race: Callable[..., None], shape: str, dtype: torch.dtype, name: str) -> None:
    def sample(n: int) -> Sample:
        return next(
            s for s in depthwise_samples(n, *CONVOLUTIONS[shape], dtype) if s.name == name and DEPTHWISE[name](s.args)
        )

    compare(race, name, shape, sample, dtype)


@pytest.mark.parametrize("name", PRODUCTS)
@dtypes
@pytest.mark.parametrize("shape", PROJECTIONS)
def test_product(race: Callable[..., None], shape: str, dtype: torch.dtype, name: str) -> None:
    conv, size = PROJECTIONS[shape]

    def sample(n: int) -> Sample:
        samples = product_samples(n, conv.in_channels, size, conv.out_channels, dtype)
        return next(s for s in samples if s.name == name and PRODUCTS[name](s.args))

    compare(race, name, shape, sample, dtype)


@pytest.mark.parametrize("name", SWEEPS)
@dtypes
@pytest.mark.parametrize("shape", EXPANSIONS)
def test_sweep(race: Callable[..., None], shape: str, dtype: torch.dtype, name: str) -> None:
    def sample(n: int) -> Sample:
        return next(s for s in sweep_samples(n, shape, dtype) if s.name == name and SWEEPS[name](s.args))

    compare(race, name, shape, sample, dtype, SWEPT_TOLERANCE)


@dtypes
def test_patches(race: Callable[..., None], dtype: torch.dtype) -> None:
    """Of the stem's convolution."""
    compare(
        race, "patches", "3x224x224 k3 s2", lambda n: Sample("patches", (images(n, 224).to(dtype), 3, 2, False)), dtype
    )


@dtypes
@convolutions
def test_depthwise_backward(race: Callable[..., None], shape: str, dtype: torch.dtype) -> None:
    """Gradients of input and weight of the convolution alone; the twin is PyTorch's own, all in the same dtype."""
    c, size, kernel, stride = CONVOLUTIONS[shape]

    def sample(n: int) -> tuple[Any, ...]:
        return next(s.args for s in depthwise_samples(n, *CONVOLUTIONS[shape], dtype) if s.name == "backward_dwconv")

    def make_ours(n: int) -> Call:
        args = sample(n)
        return lambda: torch.ops.effnet_fast.backward_dwconv(*args)[:2]

    def make_torchs(n: int) -> Call:
        grad, _, x, weight = sample(n)[:4]
        weight, window = weight.to(dtype), ([stride] * 2, [kernel // 2] * 2, [1, 1])
        return lambda: torch.ops.aten.convolution_backward(
            grad, x, weight, None, *window, False, [0, 0], c, [True, True, False]
        )[:2]

    elements = c * (2 * size**2 + (-(-size // stride)) ** 2)
    race(
        {OURS: make_ours, TWIN: make_torchs},
        examples=BATCH,
        seconds=2 * SECONDS,
        tolerance=CONVOLUTION_TOLERANCE[dtype],
        unit="GB/s",
        work=elements * dtype.itemsize / 1e9,
        table="Depthwise convolution, backward",
        row={"shape": shape, "dtype": dtype_name(dtype)},
    )
