"""BatchNorm between the passes, on [C] tensors: statistics to scale and shift, sums to gradients."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BatchNorm(NamedTuple):
    """What a BatchNorm2d holds, as the ops take it. training: batch statistics, and running ones updated."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float
    momentum: float
    training: bool

    @classmethod
    def of(cls, module: nn.BatchNorm2d) -> "BatchNorm":
        """The module's parameters and buffers; counts a batch if it is training, as its own forward would.

        Raises ValueError for a module without affine parameters or running statistics, or with momentum None.
        """
        if not (module.affine and module.track_running_stats and module.momentum is not None):
            raise ValueError("bn: must have affine parameters, running statistics and a momentum")
        if module.training:
            module.num_batches_tracked.add_(1)
        return cls(
            module.weight,
            module.bias,
            module.running_mean,
            module.running_var,
            module.eps,
            module.momentum,
            module.training,
        )

    def check(self, channels: int, name: str) -> None:
        """Raises ValueError unless the parameters are for so many channels and eps is positive."""
        if self.weight.shape != (channels,):
            raise ValueError(f"{name}: got {self.weight.shape[0]} channels, must be for {channels}")
        if not self.eps > 0:
            raise ValueError(f"{name}.eps: got {self.eps}, must be positive")

    def eager(self, y: Tensor) -> Tensor:
        """PyTorch's own batch norm of y."""
        return F.batch_norm(
            y, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def update(self, stats: Tensor, count: int) -> None:
        """Move the running statistics as torch does: towards the mean and the unbiased variance of `count` values.

        stats: [5, C] from `batch_stats`.
        """
        with torch.no_grad():
            self.running_mean.lerp_(stats[2].to(self.running_mean.dtype), self.momentum)
            unbiased = stats[4] * (count / max(count - 1, 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)

    def running(self) -> "Norm":
        """The norm that the running statistics make, in float32 at least."""
        floats = torch.promote_types(self.running_mean.dtype, torch.float32)
        return Norm.make(self.running_mean.to(floats), self.running_var.to(floats), self.weight, self.bias, self.eps)


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
        """The first four rows of `batch_stats`."""
        return cls(*stats[:4].unbind())


def batch_stats(moments: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor, eps: float, count: int) -> Tensor:
    """A training BatchNorm over `count` values a channel, from a pass's mean and m2.

    Returns [5, C]: scale, shift, mean, rstd (the fields of `Norm`), and the biased variance.
    """
    mean, m2 = moments
    var = m2 / max(count, 1)
    return torch.stack([*Norm.make(mean, var, weight, bias, eps), var])


class NormGrad(NamedTuple):
    """Gradients of weight and bias [2, C], and the terms of `backward_apply`: dy = du * scale + (y - mean) * b + a."""

    affine: Tensor
    a: Tensor
    b: Tensor


def batch_norm_grad(norm: Norm, sums: Tensor, count: int) -> NormGrad:
    """Backward of a training BatchNorm over `count` values a channel, from sums [2, C] of du and du * hat."""
    mean_du, mean_du_hat = sums / count
    return NormGrad(sums.flip(0), -norm.scale * mean_du, -norm.scale * norm.rstd * mean_du_hat)


def values_per_channel(x: Tensor) -> int:
    """How many values of [N, C, H, W] a channel's statistics are over."""
    return x.numel() // x.shape[1]
