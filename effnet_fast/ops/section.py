"""The fused middle of an MBConv block: BatchNorm + SiLU, depthwise convolution, BatchNorm + SiLU, squeeze-excite.

The passes and the algebra between them, written once for the ops `mbconv_section`, `dwconv_bn_silu` and `mbconv`. Of
the activations, only the two convolutions' outputs, e and y, are needed again in the backward pass.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_fast.ops.normalization import NormGrad, batch_norm_grad, batch_stats, values_per_channel
from effnet_fast.ops.squeeze_excite import SqueezeExcite
from effnet_fast.passes.algebra import Norm


class Kept(NamedTuple):
    """What the forward pass leaves for the backward, besides e.

    y [N, C, H', W']; stats1, stats2 [5, C] from `batch_stats`; squeeze [2, N, C]: the means and the gate. stats1 is
    empty where e is activated already, squeeze where there is no gate.
    """

    y: Tensor
    stats1: Tensor
    stats2: Tensor
    squeeze: Tensor

    @property
    def norm1(self) -> Norm | None:
        return Norm.of(self.stats1) if self.stats1.numel() else None

    @property
    def gate(self) -> Tensor | None:
        return self.squeeze[1] if self.squeeze.numel() else None


class SectionGrad(NamedTuple):
    """Gradients of a section. g is that of e up to the terms of bn1's own backward, bn1.a and bn1.b."""

    g: Tensor
    bn1: NormGrad | None
    weight: Tensor
    bn2: NormGrad
    se: SqueezeExcite | None


class SweptGrad(NamedTuple):
    """Gradients of a section with the expansion before it: of x, w_expand, bn1 (weight, bias), and as `SectionGrad`."""

    dx: Tensor
    expand: Tensor
    bn1: Tensor
    weight: Tensor
    bn2: NormGrad
    se: SqueezeExcite | None


def forward(
    passes: Any,
    e: Tensor,
    stats1: Tensor | None,
    weight: Tensor,
    bn2: tuple[Tensor, Tensor, float],
    se: SqueezeExcite | None,
    stride: int,
    same: bool,
    group: str = "",
    w_expand: Tensor | None = None,
) -> Kept:
    """All of the section but its last pass. stats1: e's, [5, C] from `batch_stats`; bn2: weight, bias, eps.

    group: the BatchNorms', see `BatchNorm`. With w_expand, e is its product with what is given as e, and not stored.
    """
    scale = shift = None
    squeeze = e.new_empty(0, dtype=torch.float32)
    if stats1 is None:
        stats1 = e.new_empty(0, dtype=torch.float32)
    else:
        scale, shift = stats1[:2].unbind()
    if w_expand is None:
        y, mean, m2 = passes.dwconv_stats(e, weight, scale, shift, stride, same)
    else:
        y, mean, m2 = passes.expand_dwconv_stats(e, w_expand, scale, shift, weight, stride, same)
    stats2 = batch_stats(passes, (mean, m2), *bn2, values_per_channel(y), group)
    if se is not None:
        pooled = passes.pool(y, stats2[0], stats2[1], True)
        squeeze = passes.squeeze_gate(pooled, y.shape[2] * y.shape[3], *se, y.dtype)
    return Kept(y, stats1, stats2, squeeze)


def backward(
    passes: Any,
    do: Tensor,
    sums: Tensor,
    e: Tensor,
    kept: Kept,
    weight: Tensor,
    se: SqueezeExcite | None,
    stride: int,
    same: bool,
    group: str = "",
) -> SectionGrad:
    """Gradients of everything, from the five sums over (do, y) and one sweep over (do, y, e)."""
    dse, dbn2, output = _output_grad(passes, do, sums, kept, se, group)
    norm1 = kept.norm1
    g, dweight, sums1 = passes.backward_dwconv(
        do, kept.y, e, weight, *output, *(norm1 or (None, None, None, None)), stride, same
    )
    dbn1 = None
    if norm1 is not None:
        dbn1 = batch_norm_grad(passes, kept.stats1, sums1[:, None], None, None, values_per_channel(e), group)
    return SectionGrad(g, dbn1, dweight.to(weight.dtype), dbn2, dse)


def backward_swept(
    passes: Any,
    do: Tensor,
    sums: Tensor,
    x: Tensor,
    w_expand: Tensor,
    moments: Tensor,
    kept: Kept,
    weight: Tensor,
    se: SqueezeExcite | None,
    residual: Tensor | None,
    stride: int,
    same: bool,
) -> SweptGrad:
    """The same of x, whose product with w_expand e is. moments: of `expand_stats`; residual: added to x's gradient."""
    dse, dbn2, output = _output_grad(passes, do, sums, kept, se)
    dx, dexpand, dweight, dbn1 = passes.backward_expand_dwconv(
        do, kept.y, x, w_expand, weight, *output, *Norm.of(kept.stats1), moments, residual, stride, same
    )
    return SweptGrad(dx, dexpand, dbn1, dweight.to(weight.dtype), dbn2, dse)


def _output_grad(
    passes: Any, do: Tensor, sums: Tensor, kept: Kept, se: SqueezeExcite | None, group: str = ""
) -> tuple[SqueezeExcite | None, NormGrad, tuple[Tensor | None, ...]]:
    """Gradients of se and bn2, and the operands by which `backward_dwconv` forms y's."""
    y, norm2, gate = kept.y, Norm.of(kept.stats2), kept.gate
    dse = pooled_grad = None
    if se is not None:
        pooled_grad, *dweights = passes.squeeze_gate_grad(kept.squeeze, sums[0], y.shape[2] * y.shape[3], *se, y.dtype)
        dse = SqueezeExcite(*(d.to(w.dtype) for d, w in zip(dweights, se, strict=True)))
    dbn2 = batch_norm_grad(passes, kept.stats2, sums, gate, pooled_grad, values_per_channel(y), group)
    return dse, dbn2, (*norm2[:3], gate, pooled_grad, dbn2.a, dbn2.b)


def fake_stats(e: Tensor, has_bn1: bool, has_se: bool) -> tuple[Tensor, Tensor, Tensor]:
    """stats1, stats2 and squeeze of `Kept`, uninitialised."""
    dtype = torch.float64 if e.dtype == torch.float64 else torch.float32
    n, c = e.shape[:2]
    stats1 = e.new_empty((5, c) if has_bn1 else 0, dtype=dtype)
    return stats1, e.new_empty(5, c, dtype=dtype), e.new_empty((2, n, c) if has_se else 0, dtype=dtype)
