"""The passes in CUDA C++ and in Triton on a GPU, against the reference in float64 on the CPU.

tests/cuda_sim and tests/triton run them without a GPU.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effnet_fast import create_model
from effnet_fast.passes import products, reference
from effnet_fast.passes.backend import passes_for, resolve, use_backend, with_products
from tests.passes.samples import (
    CONVOLUTIONS,
    SHAPES,
    Call,
    algebra_calls,
    depthwise_calls,
    elementwise_calls,
    product_calls,
)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.parametrize("backend", ["cuda", "triton"]),
]

# Relative to the largest value of an output. float32: some hundred roundings of 6e-8, and the device's exponential.
# 16 bit: the storage's rounding of an activation, and sums of few such values.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
DTYPES = tuple(TOLERANCE)
ODD_CHANNELS = ((2, 13, 6, 5), (2, 100, 4, 6))


def on_gpu(value: object) -> object:
    return value.cuda() if isinstance(value, Tensor) else value


def passes_of(backend: str, x: Tensor) -> Any:
    with use_backend(backend):
        assert resolve(x) == backend
        return passes_for(x)


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def check(backend: str, call: Call, dtype: torch.dtype) -> None:
    passes = passes_of(backend, call.args[0].cuda())
    actual = tensors(getattr(passes, call.name)(*map(on_gpu, call.args)))
    expected = tensors(getattr(with_products(reference), call.name)(*call.to_float64()))
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        limit = TOLERANCE[dtype] * max(1.0, e.abs().max().item() if e.numel() else 0.0)
        torch.testing.assert_close(a.double().cpu(), e, rtol=0, atol=limit, msg=lambda m, i=i: f"{call.name}[{i}]: {m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + ODD_CHANNELS, ids=str)
def test_pointwise_passes(backend: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for call in elementwise_calls(shape, dtype):
        check(backend, call, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "stride", "same"), CONVOLUTIONS)
@pytest.mark.parametrize("shape", SHAPES + ODD_CHANNELS, ids=str)
def test_depthwise_passes(
    backend: str, shape: tuple[int, int, int, int], kernel: int, stride: int, same: bool, dtype: torch.dtype
) -> None:
    for call in depthwise_calls(shape, dtype, kernel, stride, same):
        check(backend, call, dtype)


@pytest.mark.parametrize(
    ("images", "channels", "squeezed"), [(2, 32, 8), (0, 16, 4), (1, 8, 1), (5, 13, 3), (64, 1152, 48)]
)
def test_algebra_between_the_passes(backend: str, images: int, channels: int, squeezed: int) -> None:
    for call in algebra_calls(images, channels, squeezed):
        check(backend, call, torch.float32)


@pytest.mark.parametrize("without_dy", [0, products.WITHOUT_DY])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(backend: str, dtype: torch.dtype, without_dy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Composed of the passes and PyTorch's matrix products, whose operands are rounded."""
    for call in product_calls((2, 16, 9, 7), dtype, 48):
        with monkeypatch.context() as patch:  # what is expected takes dy's way
            patch.setattr(products, "WITHOUT_DY", without_dy)
            actual = tensors(getattr(passes_of(backend, call.args[0].cuda()), call.name)(*map(on_gpu, call.args)))
        expected = tensors(getattr(with_products(reference), call.name)(*call.to_float64()))
        for a, e in zip(actual, expected, strict=True):
            limit = 2 * TOLERANCE[dtype] * max(1.0, e.abs().max().item() if e.numel() else 0.0)
            torch.testing.assert_close(a.double().cpu(), e, rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small(backend: str, dtype: torch.dtype) -> None:
    """Few enough blocks for compute-sanitizer, every kernel."""
    for call in algebra_calls(2, 40, 10):
        check(backend, call, torch.float32)
    for shape in ((1, 16, 5, 6), (2, 5, 4, 3)):
        for call in elementwise_calls(shape, dtype):
            check(backend, call, dtype)
        for kernel, stride, same in CONVOLUTIONS:
            for call in depthwise_calls(shape, dtype, kernel, stride, same):
                check(backend, call, dtype)


def test_a_run_repeats_bit_for_bit(backend: str) -> None:
    for call in [*depthwise_calls((8, 96, 28, 28), torch.bfloat16, 5, 1, False), *algebra_calls(64, 480, 20)]:
        passes = passes_of(backend, call.args[0].cuda())
        first, again = (tensors(getattr(passes, call.name)(*map(on_gpu, call.args))) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_training_step_is_captured_in_a_graph(backend: str) -> None:
    torch.manual_seed(0)
    model = create_model("b0", drop_rate=0, drop_path_rate=0).cuda().to(memory_format=torch.channels_last).train()
    plain = copy.deepcopy(model)
    images = torch.randn(4, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.arange(4, device="cuda")

    def step(net: nn.Module) -> None:
        nn.functional.cross_entropy(net(images), labels).backward()

    state = copy.deepcopy(model.state_dict())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with use_backend(backend):
        with torch.cuda.stream(stream):  # cuBLAS and the allocator want to be warm
            step(model)
        torch.cuda.current_stream().wait_stream(stream)
        model.zero_grad()
        model.load_state_dict(state)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(model)
        graph.replay()
        step(plain)
    torch.cuda.synchronize()
    for (name, captured), direct in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(captured.grad, direct.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_step_of_a_model(backend: str) -> None:
    """Loss and every gradient of a B0 in float32, as plain PyTorch has them in float64."""
    torch.manual_seed(0)
    model = create_model("b0", 10, drop_rate=0, drop_path_rate=0).cuda().to(memory_format=torch.channels_last).train()
    wide = copy.deepcopy(model).double()
    images = torch.randn(16, 3, 96, 80, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.arange(16, device="cuda") % 10
    # cuDNN's convolution, which the stem is here, would round to TF32.
    with use_backend(backend), torch.backends.cudnn.flags(allow_tf32=False):
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
    expected = nn.functional.cross_entropy(wide(images.double()), labels)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    largest = max(q.grad.norm().item() for q in wide.parameters())
    for (name, p), q in zip(model.named_parameters(), wide.parameters(), strict=True):
        # Rounding errors of 50 layers: 1e-5 on a CPU; of the largest where the gradient itself is 0, as of a bias
        # before a convolution and its BatchNorm.
        limit = 1e-4 * q.grad.norm().item() + 1e-6 * largest
        assert (p.grad - q.grad).norm().item() < limit, name
