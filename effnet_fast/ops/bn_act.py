"""BatchNorm with SiLU or nothing after it, drop path and residual: what follows a pointwise convolution."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effnet_fast.ops.activations import as_activation, channels_last
from effnet_fast.ops.fused_op import fused_op
from effnet_fast.ops.normalization import BatchNorm, batch_norm_grad, batch_stats, update_running, values_per_channel
from effnet_fast.passes.algebra import Norm
from effnet_fast.passes.backend import passes_for, resolve


def bn_act(
    y: Tensor,
    bn: BatchNorm,
    *,
    silu: bool = True,
    residual: Tensor | None = None,
    branch_scale: Tensor | None = None,
) -> Tensor:
    """SiLU(bn(y)), or bn(y) without `silu`; times branch_scale [N] (drop path); plus residual of y's shape.

    y [N, C, H, W] of float32, bfloat16 or float16, returned in its dtype, channels_last. In training, only y is kept
    for backward, and bn's running statistics are updated. Not twice differentiable. Gradients in eval mode, and calls
    that no native backend can run, take `bn_act_eager`.
    Raises ValueError that names the argument, or RuntimeError if a backend was insisted on and can't run the call.
    """
    y = as_activation(y, "y", bn=bn.weight, residual=residual)
    bn.check(y.shape[1], "bn")
    if residual is not None:
        if residual.shape != y.shape:
            raise ValueError(f"residual: got shape {tuple(residual.shape)}, must be y's, {tuple(y.shape)}")
        residual = channels_last(residual.to(y.dtype))
    needs_grad = torch.is_grad_enabled() and (y.requires_grad or bn.weight.requires_grad or bn.bias.requires_grad)
    if resolve(y) == "eager" or (needs_grad and not bn.training):
        return bn_act_eager(y, bn, silu=silu, residual=residual, branch_scale=branch_scale)
    if not bn.training:
        scale, shift, _, _ = bn.running()
        return passes_for(y).apply(y, scale, shift, silu, branch_gate(branch_scale, y), residual)
    out, stats = _bn_act(y, bn.weight, bn.bias, bn.eps, silu, residual, branch_scale, bn.group)
    update_running([bn], [stats])
    return out


def bn_act_eager(
    y: Tensor,
    bn: BatchNorm,
    *,
    silu: bool = True,
    residual: Tensor | None = None,
    branch_scale: Tensor | None = None,
) -> Tensor:
    """`bn_act` in plain PyTorch: its fallback, oracle and baseline."""
    out = bn.eager(y)
    if silu:
        out = F.silu(out)
    if branch_scale is not None:
        out = out * branch_scale.to(out.dtype)[:, None, None, None]
    return out if residual is None else out + residual


def branch_gate(branch_scale: Tensor | None, y: Tensor) -> Tensor | None:
    """A factor per example as the passes' gate [N, C]."""
    return None if branch_scale is None else branch_scale.float()[:, None].expand(y.shape[:2]).contiguous()


def _forward(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    residual: Tensor | None,
    branch_scale: Tensor | None,
    group: str,
) -> tuple[Tensor, Tensor]:
    passes = passes_for(y)
    stats = batch_stats(passes, passes.channel_stats(y), weight, bias, eps, values_per_channel(y), group)
    return passes.apply(y, stats[0], stats[1], silu, branch_gate(branch_scale, y), residual), stats


def _fake(y, weight, bias, eps, silu, residual, branch_scale, group):
    floats = torch.float64 if y.dtype == torch.float64 else torch.float32
    return torch.empty_like(y), y.new_empty(5, y.shape[1], dtype=floats)


def _backward(
    dout: Tensor, y: Tensor, stats: Tensor, silu: bool, branch_scale: Tensor | None, group: str
) -> tuple[Tensor, Tensor]:
    """Gradients of y, and of weight and bias [2, C]."""
    passes = passes_for(y)
    dout = channels_last(dout)
    norm, gate = Norm.of(stats), branch_gate(branch_scale, y)
    sums = passes.backward_sums(dout, y, *norm, silu)
    grad = batch_norm_grad(passes, stats, sums, gate, None, values_per_channel(y), group)
    dy = passes.backward_apply(dout, y, *norm[:3], silu, gate, None, grad.a, grad.b)
    return dy, grad.affine


def _backward_fake(dout, y, stats, silu, branch_scale, group):
    return torch.empty_like(y), torch.empty_like(stats[:2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, _, _, _, silu, residual, branch_scale, ctx.group = inputs
    ctx.save_for_backward(y, output[1], branch_scale)
    ctx.silu, ctx.has_residual = silu, residual is not None


def _gradients(run: Any, ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 8
    y, stats, branch_scale = ctx.saved_tensors
    dy, affine = run(dout, y, stats, ctx.silu, branch_scale, ctx.group)
    return dy, *affine, None, None, dout if ctx.has_residual else None, None, None


_bn_act = fused_op("bn_act", _forward, _fake, _backward, _backward_fake, _setup_context, _gradients)
