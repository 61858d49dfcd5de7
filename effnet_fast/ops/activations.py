"""Activations as the passes take them, and what every op does about double backward."""

from typing import Any

import torch
from torch import Tensor


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


def refuse_double_backward(backward_op: Any, name: str) -> None:
    """Make an op's backward op raise RuntimeError when it is differentiated itself."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{name}: double backward is not supported; use_backend('eager') gives one")

    backward_op.register_autograd(refuse)
