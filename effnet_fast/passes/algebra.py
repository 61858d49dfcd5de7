"""The algebra between the passes in plain PyTorch: of the backends without their own, and the oracle of the others."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Norm(NamedTuple):
    """A BatchNorm whose statistics are known: u = y * scale + shift, hat = (y - mean) * rstd. All [C]."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    rstd: Tensor

    @classmethod
    def make(cls, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> "Norm":
        """From statistics (var is biased) and affine parameters, in the statistics' dtype."""
        rstd = (var + eps).rsqrt()
        scale = weight.to(rstd.dtype) * rstd
        return cls(scale, bias.to(rstd.dtype) - mean * scale, mean, rstd)

    @classmethod
    def of(cls, stats: Tensor) -> "Norm":
        """The first four rows of `batch_norm_stats`."""
        return cls(*stats[:4].unbind())


def batch_norm_stats(mean: Tensor, m2: Tensor, weight: Tensor, bias: Tensor, eps: float, count: int) -> Tensor:
    return torch.stack([*Norm.make(mean, m2 / max(count, 1), weight, bias, eps), m2 / max(count - 1, 1)])


def batch_norm_grad(stats: Tensor, sums: Tensor, gate: Tensor | None, pooled_grad: Tensor | None, count: int) -> Tensor:
    du = sums_of_du(sums, gate, pooled_grad)
    return torch.stack([*du.flip(0), *mean_terms(stats, du / count)])


def sums_of_du(sums: Tensor, gate: Tensor | None, pooled_grad: Tensor | None) -> Tensor:
    """[2, C] sums of du and du * hat, du as in `backward_apply`, from `backward_sums` with SiLU or without."""
    du = sums if len(sums) == 2 else sums[1::2]
    if gate is not None:
        du = du * gate
    if pooled_grad is not None:
        du = du + pooled_grad * sums[2::2]
    return du.sum(1)


def mean_terms(stats: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """a and b of `backward_apply`, from the means [2, C] of du and du * hat."""
    scale, _, _, rstd = Norm.of(stats)
    return -scale * means[0], -scale * rstd * means[1]


def squeeze_gate(
    sums: Tensor,
    pixels: int,
    w_reduce: Tensor,
    b_reduce: Tensor,
    w_expand: Tensor,
    b_expand: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    means = sums / pixels
    w_reduce, b_reduce, w_expand, b_expand = _as_matrices(means.dtype, w_reduce, b_reduce, w_expand, b_expand)
    with torch.autocast(means.device.type, enabled=False):  # the passes take float32 gates
        hidden = F.silu(F.linear(means, w_reduce, b_reduce))
        return torch.stack([means, F.linear(hidden, w_expand, b_expand).sigmoid()])


def squeeze_gate_grad(
    squeeze: Tensor,
    dgate: Tensor,
    pixels: int,
    w_reduce: Tensor,
    b_reduce: Tensor,
    w_expand: Tensor,
    b_expand: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    means, gate = squeeze.unbind()
    reduce, bias, expand = _as_matrices(means.dtype, w_reduce, b_reduce, w_expand)
    with torch.autocast(means.device.type, enabled=False):
        reduced = F.linear(means, reduce, bias)  # tiny next to a pass, so that it is run again
        dexpanded = torch.ops.aten.sigmoid_backward(dgate, gate)
        dreduced = torch.ops.aten.silu_backward(dexpanded @ expand, reduced)
        dw_reduce, dw_expand = dreduced.T @ means, dexpanded.T @ F.silu(reduced)
        pooled_grad = dreduced @ reduce / pixels
    return (
        pooled_grad,
        dw_reduce.view(w_reduce.shape),
        dreduced.sum(0),
        dw_expand.view(w_expand.shape),
        dexpanded.sum(0),
    )


def _as_matrices(dtype: torch.dtype, *weights: Tensor) -> Iterator[Tensor]:
    return (w.flatten(1).to(dtype) if w.dim() > 1 else w.to(dtype) for w in weights)
