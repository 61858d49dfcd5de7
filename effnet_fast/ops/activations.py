"""Activations as the passes take them, and 1x1 convolutions as matrix products over them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def channels_last(x: Tensor) -> Tensor:
    """The same values, contiguous in channels_last format; x itself if it lies so already."""
    return x.contiguous(memory_format=torch.channels_last)


def as_activation(x: Tensor, name: str) -> Tensor:
    """An op's input as a kernel takes it: channels_last, and in autocast's dtype where autocast is on (float64 stays).

    Raises ValueError naming the argument unless it has four dimensions.
    """
    if x.dim() != 4:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, must be [N, C, H, W]")
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    return channels_last(x)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution of a channels_last activation, weight [C_out, C_in, 1, 1]."""
    weight = weight.flatten(1).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def pointwise_grad(dy: Tensor, x: Tensor, weight: Tensor, add: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of a 1x1 convolution's input (plus `add`, of the input's shape) and weight."""
    rows, inputs = _pixels(dy), _pixels(x)
    matrix = weight.flatten(1).to(dy.dtype)
    dx = rows @ matrix if add is None else torch.addmm(_pixels(add), rows, matrix)
    n, _, h, w = x.shape
    dweight = (rows.T @ inputs).to(weight.dtype)
    return dx.view(n, h, w, -1).permute(0, 3, 1, 2), dweight.view(weight.shape)


def _pixels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def refuse_double_backward(backward_op: Any, name: str) -> None:
    """Make an op's backward op raise RuntimeError when it is differentiated itself."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{name}: double backward is not supported; use_backend('eager') gives one")

    backward_op.register_autograd(refuse)
