"""The model's parts for inference, with BatchNorms folded into the convolutions before them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from effnet_fast.ops.activations import as_activation
from effnet_fast.ops.conv_bn_act import as_pointwise, as_product, convolution_backend, convolve
from effnet_fast.ops.squeeze_excite import SqueezeExcite
from effnet_fast.passes.backend import passes_for, resolve


class Convolution(NamedTuple):
    """A convolution that has taken up the BatchNorm after it: weight [C_out, C_in / groups, k, k], bias [C_out]."""

    weight: Tensor
    bias: Tensor


def conv_folded(x: Tensor, conv: Convolution, *, stride: int = 1, same: bool = False, silu: bool = True) -> Tensor:
    """`conv_bn_act` in eval mode with a folded BatchNorm: [N, C_in, H, W] to [N, C_out, H', W'], channels_last.

    On the CPU the convolution is a matrix product, for k > 1 over patches of x; on other devices it is PyTorch's.
    Otherwise as `mbconv_folded`.
    """
    x = as_activation(x, "x", conv=conv.weight)
    weight, bias = conv
    if weight.dim() != 4 or weight.shape[1] != x.shape[1] or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"conv: got weight of shape {tuple(weight.shape)}, must be [C_out, {x.shape[1]}, k, k]")
    plain = x.device.type != "cpu" or convolution_backend(x, weight, stride) == "eager"
    if plain or _needs_grad(x, *conv):
        return conv_folded_eager(x, conv, stride=stride, same=same, silu=silu)
    passes = passes_for(x.new_empty(0, weight.shape[0], 1, 1))
    if _is_prepared(passes, x):
        panels, shift = _prepared(x, conv, lambda: (passes.pack_pointwise(as_pointwise(weight), x), _floats(bias)))
        return passes.packed_convolution(x, panels, weight.shape[-1], stride, same, shift, silu)
    source, matrix = as_product(passes, x, weight, stride, same)
    return passes.pointwise_affine(source, matrix, None, *_affine(bias), silu, None)


def conv_folded_eager(
    x: Tensor, conv: Convolution, *, stride: int = 1, same: bool = False, silu: bool = True
) -> Tensor:
    """`conv_folded` in plain PyTorch: its fallback, oracle and baseline."""
    y = convolve(x, *conv, stride, same)
    return F.silu(y) if silu else y


def mbconv_folded(
    x: Tensor,
    expand: Convolution | None,
    depthwise: Convolution,
    se: SqueezeExcite,
    project: Convolution,
    *,
    stride: int = 1,
    same: bool = False,
    residual: bool = False,
) -> Tensor:
    """`mbconv` in eval mode with folded BatchNorms: [N, C_in, H, W] to [N, C_out, H', W'], channels_last.

    x of float32, bfloat16 or float16. expand: None for a block without expansion. same: TensorFlow's SAME padding, else
    k // 2 on every side. residual: add x. Gradients, and calls that no native backend can run, take
    `mbconv_folded_eager`.
    Raises ValueError that names the argument, or RuntimeError if a backend was insisted on and can't run the call.
    """
    x = as_activation(
        x,
        "x",
        expand=None if expand is None else expand.weight,
        depthwise=depthwise.weight,
        se=se.w_reduce,
        project=project.weight,
    )
    _check(x, expand, depthwise, se, project, stride, residual)
    kernel = depthwise.weight.shape[-1]
    if resolve(x, kernel, stride) == "eager" or _needs_grad(x, *(expand or ()), *depthwise, *se, *project):
        return mbconv_folded_eager(x, expand, depthwise, se, project, stride=stride, same=same, residual=residual)
    passes = passes_for(x, kernel, stride)
    if _is_prepared(passes, x):

        def prepare() -> tuple[Tensor | None, ...]:
            ends = (None, None) if expand is None else (passes.pack_pointwise(expand.weight, x), _floats(expand.bias))
            inner = (_floats(t) for t in (*depthwise, *se))
            return *ends, *inner, passes.pack_pointwise(project.weight, x), _floats(project.bias)

        operands = _prepared(x, (*(expand or ()), *depthwise, *se, *project), prepare)
        return passes.block_inference(x, *operands, stride, same, residual)
    e = x
    if expand is not None:
        e = passes.pointwise_affine(x, expand.weight, None, *_affine(expand.bias), True, None)
    z, pooled = passes.dwconv_affine(e, depthwise.weight, None, None, *_affine(depthwise.bias), stride, same)
    gate = passes.squeeze_gate(pooled, z.shape[2] * z.shape[3], *se, z.dtype)[1]
    return passes.pointwise_affine(z, project.weight, gate, *_affine(project.bias), False, x if residual else None)


def mbconv_folded_eager(
    x: Tensor,
    expand: Convolution | None,
    depthwise: Convolution,
    se: SqueezeExcite,
    project: Convolution,
    *,
    stride: int = 1,
    same: bool = False,
    residual: bool = False,
) -> Tensor:
    """`mbconv_folded` in plain PyTorch: its fallback, oracle and baseline."""
    e = x if expand is None else F.silu(F.conv2d(x, *expand))
    z = F.silu(convolve(e, *depthwise, stride, same, groups=e.shape[1]))
    out = F.conv2d(se.eager(z), *project)
    return x + out if residual else out


# What `_prepared` made, by the first of its weights: what they were then, and the result.
_PREPARED = WeakIdKeyDictionary()


def _is_prepared(passes: Any, x: Tensor) -> bool:
    """Whether the backend takes weights that are laid out for it, once: not if this call is traced."""
    return passes.block_inference is not None and type(x) is Tensor and not torch.compiler.is_compiling()


def _prepared(x: Tensor, weights: tuple[Tensor, ...], prepare: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """prepare()'s result for inputs like x, kept until a weight changes: packing them each time takes a third of
    the time of a batch of one (B0 at 224 px, bf16)."""
    if any(w.is_inference() for w in weights):  # their changes can't be seen
        return prepare()
    state = (x.dtype, *((w.data_ptr(), w._version) for w in weights))
    known, result = _PREPARED.get(weights[0], (None, ()))
    if known != state:
        result = prepare()
        _PREPARED[weights[0]] = state, result
    return result


def _affine(bias: Tensor) -> tuple[Tensor, Tensor]:
    """A bias as the passes' scale and shift."""
    shift = _floats(bias)
    return torch.ones_like(shift), shift


def _floats(t: Tensor) -> Tensor:
    """Not t itself, with which what is kept of it has to go."""
    return t.detach().float().contiguous()


def _needs_grad(*leaves: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in leaves)


def _check(
    x: Tensor,
    expand: Convolution | None,
    depthwise: Convolution,
    se: SqueezeExcite,
    project: Convolution,
    stride: int,
    residual: bool,
) -> None:
    expanded = depthwise.weight.shape[0]
    taken, name = (expanded, "depthwise") if expand is None else (expand.weight.shape[1], "expand")
    if x.shape[1] != taken:
        raise ValueError(f"x: got {x.shape[1]} channels, {name} takes {taken}")
    if expand is not None and expand.weight.shape[0] != expanded:
        raise ValueError(f"expand: gives {expand.weight.shape[0]} channels, depthwise takes {expanded}")
    for argument, weight in (("se.w_reduce", se.w_reduce), ("project", project.weight)):
        if weight.shape[1] != expanded:
            raise ValueError(f"{argument}: takes {weight.shape[1]} channels, depthwise gives {expanded}")
    if residual and (stride != 1 or project.weight.shape[0] != x.shape[1]):
        raise ValueError(f"residual: needs stride 1 and {x.shape[1]} output channels")
