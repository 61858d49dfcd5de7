"""Every op, forward and backward in training, over the layers of B0 at 224 pixels.

bfloat16 is autocast, with parameters in float32, as in training.
"""

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from benchmarks.harness import BATCH, COMPILED, DTYPES, OURS, TWIN, Call, b0, blocks, describe, dtype_name
from effnet_fast import ops
from effnet_fast.layers import ConvBN, MBConv
from effnet_fast.passes.backend import use_backend

SECONDS = 1.0
# Of a result's norm. bfloat16: both round their activations (2^-9) some six times on the way to the input's gradient,
# PyTorch's more often.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
BLOCKS = {describe(block, size): (block, size) for block, size in blocks()}
# the stem and the head
LAYERS = {"3x224x224 to 32 k3 s2": (b0().stem, 224), "320x7x7 to 1280 k1 s1": (b0().head, 7)}

Parts = dict[str, tuple[Tensor, ...]]


# The ops as functions of plain tensors, which a compiler takes at any shape. Parts of a block or layer: convolutions by
# their weight, BatchNorms by weight, bias and running statistics.
def norm(tensors: tuple[Tensor, ...]) -> ops.BatchNorm:
    return ops.BatchNorm(*tensors, eps=1e-5, momentum=0.1, training=True)


def mbconv(x: Tensor, parts: Parts, stride: int, residual: bool) -> Tensor:
    expand = (*parts["expand"], norm(parts["bn1"])) if "expand" in parts else (None, None)
    depthwise, project = (*parts["depthwise"], norm(parts["bn2"])), (*parts["project"], norm(parts["bn3"]))
    se = ops.SqueezeExcite(*parts["se"])
    return ops.mbconv(x, *expand, *depthwise, se, *project, stride=stride, residual=residual)


def mbconv_section(e: Tensor, parts: Parts, stride: int, residual: bool) -> Tensor:
    se = ops.SqueezeExcite(*parts["se"])
    return ops.mbconv_section(e, norm(parts["bn1"]), *parts["depthwise"], norm(parts["bn2"]), se, stride=stride)


def dwconv_bn_silu(x: Tensor, parts: Parts, stride: int, residual: bool) -> Tensor:
    return ops.dwconv_bn_silu(x, *parts["depthwise"], norm(parts["bn2"]), stride=stride)


def squeeze_excite(z: Tensor, parts: Parts, stride: int, residual: bool) -> Tensor:
    return ops.squeeze_excite(z, *parts["se"])


def bn_act(p: Tensor, parts: Parts, stride: int, residual: bool) -> Tensor:
    """What follows the projection: no activation, and the block's residual, for which p itself stands in."""
    return ops.bn_act(p, norm(parts["bn3"]), silu=False, residual=p if residual else None)


def conv_bn_act(x: Tensor, parts: Parts, stride: int, residual: bool) -> Tensor:
    return ops.conv_bn_act(x, *parts["conv"], norm(parts["bn"]), stride=stride)


OPS = {op.__name__: op for op in (mbconv, mbconv_section, dwconv_bn_silu, squeeze_excite, bn_act, conv_bn_act)}


def parts_of(layer: MBConv | ConvBN) -> Parts:
    def conv_bn(layer: ConvBN) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        bn = layer.bn
        return (layer.conv.weight,), (bn.weight, bn.bias, bn.running_mean, bn.running_var)

    parts: Parts = {}
    if isinstance(layer, ConvBN):
        parts["conv"], parts["bn"] = conv_bn(layer)
    else:
        parts["depthwise"], parts["bn2"] = conv_bn(layer.depthwise)
        parts["se"] = tuple(layer.se.operands())
        parts["project"], parts["bn3"] = conv_bn(layer.project)
        if layer.expand is not None:
            parts["expand"], parts["bn1"] = conv_bn(layer.expand)
    # tensors rather than parameters, whose shapes a compiler would take for constants
    return {
        name: tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in tensors)
        for name, tensors in parts.items()
    }


def window(name: str, shape: str) -> tuple[MBConv | ConvBN, tuple[int, int, int], int, bool]:
    """The block or layer, the op's input [C, H, W], its stride, and whether there is a residual."""
    if name == "conv_bn_act":
        layer, size = LAYERS[shape]
        return layer, (layer.conv.in_channels, size, size), layer.conv.stride[0], False
    block, size = BLOCKS[shape]
    conv = block.depthwise.conv
    narrower = -(-size // conv.stride[0])
    input_shape = {
        "mbconv": ((block.expand or block.depthwise).conv.in_channels, size, size),
        "mbconv_section": (conv.in_channels, size, size),
        "dwconv_bn_silu": (conv.in_channels, size, size),
        "squeeze_excite": (conv.out_channels, narrower, narrower),
        "bn_act": (block.project.conv.out_channels, narrower, narrower),
    }[name]
    return block, input_shape, conv.stride[0], block.has_residual


@cache
def compiled(name: str) -> Callable[..., Tensor]:
    return torch.compile(OPS[name], dynamic=True)


# A block without expansion has no section, only its depthwise convolution, BatchNorm and SiLU.
CASES = [
    pytest.param(kind, name, id=f"{name}-{kind}")
    for kind, (block, _) in BLOCKS.items()
    for name in OPS
    if name != "conv_bn_act" and (block.expand or name != "mbconv_section")
] + [pytest.param(kind, "conv_bn_act", id=f"conv_bn_act-{kind}") for kind in LAYERS]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(("shape", "name"), CASES)
def test_op(race: Callable[..., None], shape: str, name: str, dtype: torch.dtype) -> None:
    layer, input_shape, stride, residual = window(name, shape)

    def make(backend: str, op: Callable[..., Tensor], n: int) -> Call:
        generator = torch.Generator().manual_seed(0)

        def activation(shape: tuple[int, ...]) -> Tensor:
            values = torch.randn(shape, generator=generator).to(dtype)
            return values.contiguous(memory_format=torch.channels_last)

        parts = parts_of(layer)
        x = activation((n, *input_shape)).requires_grad_()
        leaves = [x, *(t for tensors in parts.values() for t in tensors if t.requires_grad)]

        def forward() -> Tensor:
            with use_backend(backend), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return op(x, parts, stride, residual)

        grad = activation(forward().shape)

        def call() -> list[Tensor]:
            out = forward()
            return [out.detach(), torch.autograd.grad(out, leaves, grad, allow_unused=True)[0]]

        return call

    op = OPS[name]
    race(
        {
            OURS: partial(make, "cpu", op),
            TWIN: partial(make, "eager", op),
            COMPILED: lambda n: make("eager", compiled(name), n),
        },
        examples=BATCH,
        seconds=SECONDS,
        tolerance=TOLERANCE[dtype],
        unit="images/s",
        table="Ops, forward and backward",
        row={"op": name, "shape": shape, "dtype": dtype_name(dtype)},
    )
