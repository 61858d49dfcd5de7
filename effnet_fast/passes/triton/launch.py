"""How the kernels are launched: the cut of the work, and checks of what is passed."""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from effnet_fast.passes.reference import same_padding

# Programs of a pass whose partial results are added up afterwards: some waves on a large GPU, and few enough for the
# partials to be small. Not from the device, so that results are the same on every GPU.
PROGRAMS = 1024


def registers(x: Tensor) -> dict[str, int]:
    """Keyword arguments of the depthwise kernels: all the registers that a thread can have.

    Left to itself, NVIDIA's assembler gives them fewer, for the sake of more warps, and spills some. Triton knows the
    argument for NVIDIA's GPUs only.
    """
    return {} if torch.version.hip or x.device.type == "xpu" else {"maxnreg": 255}


def strip_rows(height: int, others: int) -> int:
    """Rows of a strip: as many as leave PROGRAMS programs, as each strip reads rows around it again, but 16 at least.

    others: programs of a pass whose strips are as high as their images.
    """
    segments = min(triton.cdiv(PROGRAMS, max(1, others)), triton.cdiv(height, 16))
    return triton.cdiv(height, segments)


def group(channels: int) -> tuple[int, int]:
    """(groups, GROUP) with channels = groups * GROUP: tells the compiler that pixels begin at multiples of 8 values."""
    return (channels // 8, 8) if channels % 8 == 0 else (channels, 1)


def padding(x: Tensor, kernel: int, stride: int, same: bool) -> tuple[int, int]:
    """Rows and columns of zeros above and to the left of x."""
    if same:
        return same_padding(x.shape[2], kernel, stride)[0], same_padding(x.shape[3], kernel, stride)[0]
    return kernel // 2, kernel // 2


def empty_floats(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised float32 on a tensor's device."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def pack_weight(weight: Tensor, block: int) -> Tensor:
    """Depthwise weights [C, 1, k, k] as float32 [blocks of channels, k * k, block], zeros where there is no channel."""
    taps = weight.flatten(1).float()
    taps = F.pad(taps, (0, 0, 0, -len(taps) % block))
    return taps.view(-1, block, taps.shape[1]).transpose(1, 2).contiguous()


def check_activation(x: Tensor, name: str) -> None:
    """Raises ValueError unless x is [N, C, H, W], channels_last, in a storage dtype."""
    if x.dim() != 4:
        raise ValueError(f"{name}: got {x.dim()} dimensions, must be [N, C, H, W]")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name}: got {x.dtype}, must be float32, bfloat16 or float16")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"{name}: must be contiguous in channels_last format")


def check_like(x: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """Raises ValueError unless x is an activation of the other's shape and dtype."""
    check_activation(x, name)
    if x.shape != other.shape or x.dtype != other.dtype:
        raise ValueError(f"{name}: got {x.dtype} {tuple(x.shape)}, must be as {other_name}")


def check_window(x: Tensor, weight: Tensor, stride: int) -> None:
    """Raises ValueError unless the weight is for x's channels, and its kernel and the stride are known."""
    if weight.dim() != 4 or weight.shape[:2] != (x.shape[1], 1) or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, must be [{x.shape[1]}, 1, k, k]")
    if weight.shape[-1] not in (3, 5, 7):
        raise ValueError(f"weight: got a kernel of {weight.shape[-1]}, must be 3, 5 or 7")
    if stride not in (1, 2):
        raise ValueError(f"stride: got {stride}, must be 1 or 2")


def check_operands(x: Tensor, **operands: Any) -> None:
    """Raises ValueError unless every operand is None or float32 [C], or [N, C] for gate and pooled_grad."""
    for name, operand in operands.items():
        shape = tuple(x.shape[:2]) if name in ("gate", "pooled_grad") else (x.shape[1],)
        if operand is None:
            continue
        if operand.dtype != torch.float32 or tuple(operand.shape) != shape or not operand.is_contiguous():
            raise ValueError(f"{name}: got {operand.dtype} {tuple(operand.shape)}, must be contiguous float32 {shape}")
