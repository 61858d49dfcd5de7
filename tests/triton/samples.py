"""Which of the sample calls of a depthwise pass run for each shape: all kinds of operands in turn."""

import torch

from tests.passes.samples import SHAPES, Call, depthwise_calls

WINDOWS = tuple((kernel, stride) for kernel in (3, 5, 7) for stride in (1, 2))


def samples() -> tuple[tuple[int, int, int, int], ...]:
    """The shapes of every backend, and channels that no vector divides."""
    return (*SHAPES, (2, 13, 5, 9))


def call_of(name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, kernel: int, stride: int) -> Call:
    """One of a pass's sample calls; which, and which padding, changes with the shape, the kernel and the stride."""
    turn = samples().index(shape) if shape in samples() else 0
    turn += kernel // 2 + 3 * (stride - 1)
    calls = [call for call in depthwise_calls(shape, dtype, kernel, stride, turn % 2 == 0) if call.name == name]
    return calls[(turn + turn // len(calls)) % len(calls)]
