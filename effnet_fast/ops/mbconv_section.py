"""The section as ops of their own: all of it, or only the depthwise convolution, BatchNorm and SiLU."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effnet_fast.ops import section as sections
from effnet_fast.ops.activations import as_activation, channels_last
from effnet_fast.ops.fused_op import fused_op
from effnet_fast.ops.normalization import BatchNorm, Norm, batch_stats, update_running, values_per_channel
from effnet_fast.ops.squeeze_excite import SqueezeExcite, gated
from effnet_fast.passes.backend import passes_for, resolve
from effnet_fast.passes.reference import dwconv
from effnet_fast.passes.schema import convolution_output


def mbconv_section(
    e: Tensor,
    bn1: BatchNorm,
    weight: Tensor,
    bn2: BatchNorm,
    se: SqueezeExcite,
    *,
    stride: int = 1,
    same: bool = False,
) -> Tensor:
    """From the expand convolution's output to the project convolution's input, gated: [N, C, H, W] to [N, C, H', W'].

    o = z * gate(mean(z)), z = SiLU(bn2(dwconv(SiLU(bn1(e))))); weight [C, 1, k, k]; channels_last, float32, bfloat16
    or float16. same: TensorFlow's SAME padding, else k // 2 on every side.
    In training, e and the depthwise convolution's output are kept for backward, and running statistics are updated.
    Not twice differentiable. Gradients in eval mode, BatchNorms over a process group, and calls that no native backend
    can run, take `mbconv_section_eager`.
    Raises ValueError that names the argument, or RuntimeError if a backend was insisted on and can't run the call.
    """
    e = as_activation(e, "e", bn1=bn1.weight, weight=weight, bn2=bn2.weight, se=se.w_reduce)
    _check(e, "e", weight, (bn1, bn2), se)
    if _runs_eagerly(e, weight, stride, (bn1, bn2), tuple(se)):
        return mbconv_section_eager(e, bn1, weight, bn2, se, stride=stride, same=same)
    if bn2.training:
        return _training(e, bn1, weight, bn2, se, stride, same)
    passes = passes_for(e, weight.shape[-1], stride)
    z, pooled = passes.dwconv_affine(e, weight, *bn1.running()[:2], *bn2.running()[:2], stride, same)
    return gated(passes, z, passes.squeeze_gate(pooled, z.shape[2] * z.shape[3], *se, z.dtype)[1])


def mbconv_section_eager(
    e: Tensor,
    bn1: BatchNorm,
    weight: Tensor,
    bn2: BatchNorm,
    se: SqueezeExcite,
    *,
    stride: int = 1,
    same: bool = False,
) -> Tensor:
    """`mbconv_section` in plain PyTorch: its fallback, oracle and baseline."""
    return se.eager(dwconv_bn_silu_eager(F.silu(bn1.eager(e)), weight, bn2, stride=stride, same=same))


def dwconv_bn_silu(x: Tensor, weight: Tensor, bn: BatchNorm, *, stride: int = 1, same: bool = False) -> Tensor:
    """SiLU(bn(depthwise convolution of x)): [N, C, H, W] to [N, C, H', W'], weight [C, 1, k, k].

    Otherwise as `mbconv_section`; kept for backward are x and the convolution's output.
    """
    x = as_activation(x, "x", weight=weight, bn=bn.weight)
    _check(x, "x", weight, (bn,), None)
    if _runs_eagerly(x, weight, stride, (bn,), ()):
        return dwconv_bn_silu_eager(x, weight, bn, stride=stride, same=same)
    if bn.training:
        return _training(x, None, weight, bn, None, stride, same)
    passes = passes_for(x, weight.shape[-1], stride)
    return passes.dwconv_affine(x, weight, None, None, *bn.running()[:2], stride, same)[0]


def dwconv_bn_silu_eager(x: Tensor, weight: Tensor, bn: BatchNorm, *, stride: int = 1, same: bool = False) -> Tensor:
    """`dwconv_bn_silu` in plain PyTorch: its fallback, oracle and baseline."""
    return F.silu(bn.eager(dwconv(x, weight, stride, same)))


def _runs_eagerly(
    x: Tensor, weight: Tensor, stride: int, norms: tuple[BatchNorm, ...], others: tuple[Tensor, ...]
) -> bool:
    if resolve(x, weight.shape[-1], stride) == "eager" or len({bn.training for bn in norms}) > 1:
        return True
    if norms[0].training and any(bn.group for bn in norms):
        return True
    leaves = (x, weight, *others, *(p for bn in norms for p in (bn.weight, bn.bias)))
    return not norms[0].training and torch.is_grad_enabled() and any(t.requires_grad for t in leaves)


def _check(x: Tensor, name: str, weight: Tensor, norms: tuple[BatchNorm, ...], se: SqueezeExcite | None) -> None:
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, must be [C, 1, k, k]")
    if x.shape[1] != weight.shape[0]:
        raise ValueError(f"{name}: got {x.shape[1]} channels, weight takes {weight.shape[0]}")
    for bn in norms:
        bn.check(x.shape[1], "bn")
    if se is not None and se.w_reduce.shape[1] != x.shape[1]:
        raise ValueError(f"se.w_reduce: takes {se.w_reduce.shape[1]} channels, {name} has {x.shape[1]}")


def _training(
    e: Tensor,
    bn1: BatchNorm | None,
    weight: Tensor,
    bn2: BatchNorm,
    se: SqueezeExcite | None,
    stride: int,
    same: bool,
) -> Tensor:
    affine1 = (None, None, 0.0) if bn1 is None else (bn1.weight, bn1.bias, bn1.eps)
    o, _, stats1, stats2, _ = _section(
        e, *affine1, weight, bn2.weight, bn2.bias, bn2.eps, *(se or (None,) * 4), stride, same
    )
    update_running([bn2] if bn1 is None else [bn1, bn2], [stats2] if bn1 is None else [stats1, stats2])
    return o


def _squeeze_excite(*weights: Tensor | None) -> SqueezeExcite | None:
    return None if weights[0] is None else SqueezeExcite(*weights)


def _forward(
    e: Tensor,
    bn1_weight: Tensor | None,
    bn1_bias: Tensor | None,
    bn1_eps: float,
    weight: Tensor,
    bn2_weight: Tensor,
    bn2_bias: Tensor,
    bn2_eps: float,
    w_reduce: Tensor | None,
    b_reduce: Tensor | None,
    w_expand: Tensor | None,
    b_expand: Tensor | None,
    stride: int,
    same: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, and the fields of `section.Kept`."""
    passes = passes_for(e, weight.shape[-1], stride)
    stats1 = None
    if bn1_weight is not None and bn1_bias is not None:
        stats1 = batch_stats(passes, passes.channel_stats(e), bn1_weight, bn1_bias, bn1_eps, values_per_channel(e))
    se = _squeeze_excite(w_reduce, b_reduce, w_expand, b_expand)
    kept = sections.forward(passes, e, stats1, weight, (bn2_weight, bn2_bias, bn2_eps), se, stride, same)
    return passes.apply(kept.y, kept.stats2[0], kept.stats2[1], True, kept.gate, None), *kept


def _fake(
    e, bn1_weight, bn1_bias, bn1_eps, weight, bn2_weight, bn2_bias, bn2_eps, w_reduce, b_reduce, w_expand, b_expand,
    stride, same,
):  # fmt: skip
    o = convolution_output(e, weight, stride, same)
    return o, torch.empty_like(o), *sections.fake_stats(e, bn1_weight is not None, w_reduce is not None)


def _backward(
    do: Tensor,
    e: Tensor,
    y: Tensor,
    stats1: Tensor,
    stats2: Tensor,
    squeeze: Tensor,
    weight: Tensor,
    w_reduce: Tensor | None,
    b_reduce: Tensor | None,
    w_expand: Tensor | None,
    b_expand: Tensor | None,
    stride: int,
    same: bool,
) -> list[Tensor]:
    """Gradients of e, bn2 [2, C] (weight, bias), weight, then bn1 if there is one, then se if there is one."""
    passes = passes_for(e, weight.shape[-1], stride)
    kept = sections.Kept(y, stats1, stats2, squeeze)
    se = _squeeze_excite(w_reduce, b_reduce, w_expand, b_expand)
    do = channels_last(do)
    sums = passes.backward_sums(do, y, *Norm.of(stats2), True)
    grad = sections.backward(passes, do, sums, e, kept, weight, se, stride, same)
    if grad.bn1 is None:
        return [grad.g, grad.bn2.affine, grad.weight, *(grad.se or ())]
    de = passes.backward_apply(grad.g, e, *stats1[:3].unbind(), False, None, None, grad.bn1.a, grad.bn1.b)
    return [de, grad.bn2.affine, grad.weight, grad.bn1.affine, *(grad.se or ())]


def _backward_fake(do, e, y, stats1, stats2, squeeze, weight, w_reduce, b_reduce, w_expand, b_expand, stride, same):
    like = [e, stats2[:2], weight]
    like += [stats1[:2]] if stats1.numel() else []
    like += [] if w_reduce is None else [w_reduce, b_reduce, w_expand, b_expand]
    return [torch.empty_like(t) for t in like]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    e, bn1_weight, _, _, weight, _, _, _, *se, stride, same = inputs
    ctx.save_for_backward(e, *output[1:], weight, *se)
    ctx.options = stride, same
    ctx.has_bn1, ctx.has_se = bn1_weight is not None, se[0] is not None


def _gradients(run: Any, ctx: Any, do: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 14
    de, dbn2, dweight, *rest = run(do, *ctx.saved_tensors, *ctx.options)
    dbn1 = rest.pop(0) if ctx.has_bn1 else (None, None)
    dse = rest if ctx.has_se else (None,) * 4
    return de, *dbn1, None, dweight, *dbn2, None, *dse, None, None


_section = fused_op("mbconv_section", _forward, _fake, _backward, _backward_fake, _setup_context, _gradients)
