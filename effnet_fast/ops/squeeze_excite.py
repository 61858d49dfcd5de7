"""Squeeze-excite (Hu et al. 2018): each channel times a gate, a two-layer MLP of the channels' means."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effnet_fast.ops.activations import as_activation, channels_last
from effnet_fast.ops.fused_op import fused_op
from effnet_fast.passes.backend import passes_for, resolve
from effnet_fast.passes.products import identity


class SqueezeExcite(NamedTuple):
    """Weights of the two 1x1 convolutions: reduce [R, C, 1, 1], [R]; expand [C, R, 1, 1], [C]."""

    w_reduce: Tensor
    b_reduce: Tensor
    w_expand: Tensor
    b_expand: Tensor

    def eager(self, z: Tensor) -> Tensor:
        """z times its gate, in plain PyTorch."""
        hidden = F.silu(F.conv2d(z.mean((2, 3), keepdim=True), self.w_reduce, self.b_reduce))
        return z * F.conv2d(hidden, self.w_expand, self.b_expand).sigmoid()


def squeeze_excite(x: Tensor, w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor) -> Tensor:
    """x times its gate: [N, C, H, W] of float32, bfloat16 or float16, channels_last. Only x is kept for backward.

    Weights as in `SqueezeExcite`. Not twice differentiable. Calls that no native backend can run take
    `squeeze_excite_eager`.
    Raises ValueError that names the argument, or RuntimeError if a backend was insisted on and can't run the call.
    """
    x = as_activation(x, "x", w_reduce=w_reduce, b_reduce=b_reduce, w_expand=w_expand, b_expand=b_expand)
    if x.shape[1] != w_reduce.shape[1]:
        raise ValueError(f"x: got {x.shape[1]} channels, w_reduce takes {w_reduce.shape[1]}")
    if resolve(x) == "eager":
        return squeeze_excite_eager(x, w_reduce, b_reduce, w_expand, b_expand)
    return _squeeze_excite(x, w_reduce, b_reduce, w_expand, b_expand)[0]


def squeeze_excite_eager(x: Tensor, w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor) -> Tensor:
    """`squeeze_excite` in plain PyTorch: its fallback, oracle and baseline."""
    return SqueezeExcite(w_reduce, b_reduce, w_expand, b_expand).eager(x)


def gated(passes: Any, x: Tensor, gate: Tensor) -> Tensor:
    """x times a gate [N, C]."""
    return passes.apply(x, *identity(x), False, gate, None)


def _forward(
    x: Tensor, w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor
) -> tuple[Tensor, Tensor]:
    """x times its gate, and the means and the gate [2, N, C]."""
    passes = passes_for(x)
    sums = passes.pool(x, *identity(x), False)
    squeeze = passes.squeeze_gate(sums, x.shape[2] * x.shape[3], w_reduce, b_reduce, w_expand, b_expand, x.dtype)
    return gated(passes, x, squeeze[1]), squeeze


def _fake(x, w_reduce, b_reduce, w_expand, b_expand):
    floats = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty_like(x), x.new_empty((2, *x.shape[:2]), dtype=floats)


def _backward(
    dout: Tensor, x: Tensor, squeeze: Tensor, w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    passes = passes_for(x)
    dout = channels_last(dout)
    weights = (w_reduce, b_reduce, w_expand, b_expand)
    ones, zeros = identity(x)
    dgate = passes.backward_sums(dout, x, ones, zeros, zeros, ones, False)[1]
    pooled_grad, *dweights = passes.squeeze_gate_grad(squeeze, dgate, x.shape[2] * x.shape[3], *weights, x.dtype)
    dx = passes.backward_apply(dout, x, ones, zeros, zeros, False, squeeze[1], pooled_grad, zeros, zeros)
    return dx, *(d.to(w.dtype) for d, w in zip(dweights, weights, strict=True))


def _backward_fake(dout, x, squeeze, w_reduce, b_reduce, w_expand, b_expand):
    return tuple(torch.empty_like(t) for t in (x, w_reduce, b_reduce, w_expand, b_expand))


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *weights = inputs
    ctx.save_for_backward(x, output[1], *weights)


def _gradients(run: Any, ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 5
    return tuple(run(dout, *ctx.saved_tensors))


_squeeze_excite = fused_op("squeeze_excite", _forward, _fake, _backward, _backward_fake, _setup_context, _gradients)
