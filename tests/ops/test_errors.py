"""Wrong input to any op: one line that names the argument. Channel counts, residuals and the like: test_ops."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from effnet_fast import ops
from tests.ops.test_ops import CASES, OPS, Block, sample


def call_folded(op: Callable[..., Tensor], block: Block, x: Tensor) -> Tensor:
    names = ("expand", "depthwise", "project")
    convolutions = (ops.Convolution(block.weights[name], bn.bias) for name, bn in zip(names, block.norms, strict=True))
    expand, depthwise, project = convolutions
    return op(x, expand, depthwise, block.se(), project, **block.window())


def call_conv_folded(op: Callable[..., Tensor], block: Block, x: Tensor) -> Tensor:
    return op(x, ops.Convolution(block.weights["expand"], block.norms[0].bias))


CALLS = {name: (op, call, uses_input) for name, (op, _, call, uses_input) in OPS.items()}
CALLS |= {
    "mbconv_folded": (ops.mbconv_folded, call_folded, True),
    "conv_folded": (ops.conv_folded, call_conv_folded, True),
}


def expect(message: str, name: str, change: Callable[[Tensor], Tensor], block: Block | None = None) -> None:
    op, call, uses_input = CALLS[name]
    usual, x = sample(CASES[0], uses_input)
    with pytest.raises(ValueError, match=message) as error:
        call(op, block or usual, change(x))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("change", [lambda x: x[0], lambda x: x[None]], ids=["3", "5"])
def test_rank(name: str, change: Callable[[Tensor], Tensor]) -> None:
    expect(r"^[xey]: got shape \([\d, ]+\), must be \[N, C, H, W\]$", name, change)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_dtype(name: str, dtype: torch.dtype) -> None:
    expect(rf"^[xey]: got {dtype}, must be a floating-point dtype$", name, lambda x: x.to(dtype))


@pytest.mark.parametrize("name", CALLS)
def test_float64_and_not(name: str) -> None:
    """A float64 input with float32 parameters, and the other way round."""
    message = r"^[\w.]+: got torch.float{}, [xey] is torch.float{}: both or neither must be float64$"
    expect(message.format(32, 64), name, torch.Tensor.double)
    block, _ = sample(CASES[0], CALLS[name][2])
    expect(message.format(64, 32), name, lambda x: x, block.double())


@pytest.mark.parametrize("name", CALLS)
def test_device(name: str) -> None:
    expect(r"^[\w.]+: is on cpu, must be on meta as [xey]$", name, lambda x: x.to("meta"))


@pytest.mark.parametrize("part", ["w_depthwise", "bn2", "se", "w_project", "bn1", "bn3", "w_expand"])
def test_device_of_each_operand(part: str) -> None:
    block, x = sample(CASES[0], True)
    operands = {
        **{"w_expand": block.weights["expand"], "bn1": block.bn(0), "w_depthwise": block.weights["depthwise"]},
        **{"bn2": block.bn(1), "se": block.se(), "w_project": block.weights["project"], "bn3": block.bn(2)},
    }
    operand = operands[part]
    if isinstance(operand, Tensor):
        operands[part] = operand.to("meta")
    else:
        operands[part] = type(operand)(*(t.to("meta") if isinstance(t, Tensor) else t for t in operand))
    with pytest.raises(ValueError, match=re.escape(f"{part}: is on meta, must be on cpu as x")):
        ops.mbconv(x, *operands.values())


@pytest.mark.parametrize("eps", [-1.0, 0.0, float("nan")])
@pytest.mark.parametrize("name", [name for name in OPS if name != "squeeze_excite"])
def test_eps(name: str, eps: float) -> None:
    block, _ = sample(CASES[0], CALLS[name][2])
    for bn in block.norms:
        bn.eps = eps
    expect(rf"^bn\d?\.eps: got {eps}, must be positive$", name, lambda x: x, block)


@pytest.mark.parametrize("wrong", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str)
def test_batch_norm_without_parts(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^bn: must have affine parameters, running statistics and a momentum$"):
        ops.BatchNorm.of(nn.BatchNorm2d(8, **wrong))
