"""Squeeze-excite (Hu et al. 2018): each channel times a gate, a two-layer MLP of the channels' means."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effnet_fast.ops.activations import as_activation, channels_last, refuse_double_backward
from effnet_fast.ops.custom_op import custom_op
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

    def gate(self, pooled: Tensor) -> Tensor:
        """The gate [N, C] of the channels' means [N, C], in the means' dtype."""
        return self._mlp(pooled)[-1]

    def gate_grad(self, pooled: Tensor, dgate: Tensor) -> tuple[Tensor, "SqueezeExcite"]:
        """Gradients of the means and of the weights. The MLP is tiny next to a pass, so it is simply run again."""
        reduced, hidden, gate = self._mlp(pooled)
        w_reduce, w_expand = self.w_reduce.flatten(1).to(pooled.dtype), self.w_expand.flatten(1).to(pooled.dtype)
        dexpanded = dgate * gate * (1 - gate)
        sig = reduced.sigmoid()
        dreduced = dexpanded @ w_expand * (sig + hidden * (1 - sig))
        grads = (dreduced.T @ pooled, dreduced.sum(0), dexpanded.T @ hidden, dexpanded.sum(0))
        shaped = (g.view(p.shape).to(p.dtype) for g, p in zip(grads, self, strict=True))
        return dreduced @ w_reduce, SqueezeExcite(*shaped)

    def _mlp(self, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w_reduce, b_reduce, w_expand, b_expand = (p.to(pooled.dtype) for p in self)
        with torch.autocast(pooled.device.type, enabled=False):  # the passes take float32 gates
            reduced = F.linear(pooled, w_reduce.flatten(1), b_reduce)
            hidden = F.silu(reduced)
            return reduced, hidden, F.linear(hidden, w_expand.flatten(1), b_expand).sigmoid()


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


@custom_op("squeeze_excite")
def _squeeze_excite(
    x: Tensor, w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor
) -> tuple[Tensor, Tensor]:
    passes = passes_for(x)
    pooled = passes.pool(x, *identity(x), False) / (x.shape[2] * x.shape[3])
    return gated(passes, x, SqueezeExcite(w_reduce, b_reduce, w_expand, b_expand).gate(pooled)), pooled


@_squeeze_excite.register_fake
def _(x, w_reduce, b_reduce, w_expand, b_expand):
    floats = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty_like(x), x.new_empty(x.shape[:2], dtype=floats)


@custom_op("squeeze_excite_backward")
def _squeeze_excite_backward(
    dout: Tensor, x: Tensor, pooled: Tensor, w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    passes = passes_for(x)
    dout = channels_last(dout)
    se = SqueezeExcite(w_reduce, b_reduce, w_expand, b_expand)
    ones, zeros = identity(x)
    dgate = passes.backward_sums(dout, x, ones, zeros, zeros, ones, False)[1]
    dpooled, dse = se.gate_grad(pooled, dgate)
    pooled_grad = dpooled / (x.shape[2] * x.shape[3])
    dx = passes.backward_apply(dout, x, ones, zeros, zeros, False, se.gate(pooled), pooled_grad, zeros, zeros)
    return dx, *dse


@_squeeze_excite_backward.register_fake
def _(dout, x, pooled, w_reduce, b_reduce, w_expand, b_expand):
    return tuple(torch.empty_like(t) for t in (x, w_reduce, b_reduce, w_expand, b_expand))


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *weights = inputs
    ctx.save_for_backward(x, output[1], *weights)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 5
    return tuple(_squeeze_excite_backward(dout, *ctx.saved_tensors))


_squeeze_excite.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(_squeeze_excite_backward, "squeeze_excite")
