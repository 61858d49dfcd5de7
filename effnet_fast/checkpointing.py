"""Modules that keep only their input for the backward pass, and run again in it."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effnet_fast.passes.backend import current, use_backend


def checkpointed(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """x through the modules, one after another; what their backward passes need is computed again from x.

    The same random numbers, autocast and backend are in force then, so that gradients are the same, bit for bit; the
    modules' buffers (running statistics) change only the first time.
    """
    # A compiler knows no checkpoint with contexts of its own. As a decorator, this would import it with the package.
    return torch.compiler.disable(_checkpointed)(modules, x)


def _checkpointed(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    def run(x: Tensor) -> Tensor:
        for module in modules:
            x = module(x)
        return x

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _again(modules, current())

    return checkpoint(run, x, use_reentrant=False, context_fn=contexts)


@contextmanager
def _again(modules: Sequence[nn.Module], backend: str) -> Iterator[None]:
    buffers = [buffer for module in modules for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        with use_backend(backend):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
