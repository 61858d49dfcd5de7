"""What all fused ops are made of: a forward and a backward function, known to autograd and to compilers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def fused_op(
    name: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    backward_fake: Callable[..., Any],
    setup_context: Callable[..., None],
    gradients: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Any]:
    """``forward`` as a differentiable op. Its first output is the op's, the others are what it keeps for backward.

    forward, backward: annotated, as `torch.library.custom_op` takes them; they mutate nothing. fake, backward_fake:
    uninitialised outputs. setup_context(ctx, inputs, output) saves for gradients(run, ctx, grad), which calls
    run(...), the backward function in one form or another, and returns a gradient for every input.

    Compilers see the ops effnet_fast::name and effnet_fast::name_backward. Else the functions are called directly:
    the Python part of the dispatcher takes longer than some of the passes (5 of 56 ms a training step of B0 at 64 px).
    """
    op = torch.library.custom_op(f"effnet_fast::{name}", forward, mutates_args=())
    op.register_fake(fake)
    backward_op = torch.library.custom_op(f"effnet_fast::{name}_backward", backward, mutates_args=())
    backward_op.register_fake(backward_fake)
    op.register_autograd(partial(gradients, backward_op), setup_context=partial(_save, setup_context))

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{name}: double backward is not supported; use_backend('eager') gives one")

    backward_op.register_autograd(refuse)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:  # with a setup_context of its own, torch inspects it at every call
            output = forward(*inputs)
            _save(setup_context, ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            twice = torch.is_grad_enabled()  # only then is the backward function itself recorded, by its op
            return gradients(backward_op if twice else backward, ctx, *grads)

    Direct.__name__ = name

    def call(*inputs: Any) -> Any:
        return op(*inputs) if torch.compiler.is_compiling() else Direct.apply(*inputs)

    return call


def _save(setup_context: Callable[..., None], ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    setup_context(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
