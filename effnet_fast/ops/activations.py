"""Activations as the passes take them."""

import torch
from torch import Tensor

from effnet_fast.passes.backend import assumed_constant


def channels_last(x: Tensor) -> Tensor:
    """The same values, contiguous in channels_last format; x itself if it lies so already."""
    return x.contiguous(memory_format=torch.channels_last)


def as_activation(x: Tensor, name: str, **operands: Tensor | None) -> Tensor:
    """An op's input as a kernel takes it: channels_last, and in autocast's dtype where autocast is on (float64 stays).

    Raises ValueError naming the argument unless x has four dimensions and a floating-point dtype, and the other
    operands, by name, are on its device, and in float64 where it is.
    """
    if x.dim() != 4:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, must be [N, C, H, W]")
    if not x.is_floating_point():
        raise ValueError(f"{name}: got {x.dtype}, must be a floating-point dtype")
    for operand, tensor in operands.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{operand}: is on {tensor.device}, must be on {x.device} as {name}")
        if tensor is not None and (tensor.dtype == torch.float64) != (x.dtype == torch.float64):
            raise ValueError(f"{operand}: got {tensor.dtype}, {name} is {x.dtype}: both or neither must be float64")
    device = x.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    return channels_last(x)


@assumed_constant  # the compiler of torch 2.11 can't trace it
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
