"""BatchNorm between the passes, on [C] tensors: statistics to scale and shift, sums to gradients."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.distributed_c10d import GroupName, ProcessGroup, _resolve_process_group
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F

from effnet_fast.passes.algebra import Norm, mean_terms, sums_of_du


class BatchNorm(NamedTuple):
    """What a BatchNorm2d holds, as the ops take it. training: batch statistics, and running ones updated.

    group: name of the process group over whose batches together the statistics are; "" for the own batch's.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float
    momentum: float
    training: bool
    group: str = ""

    @classmethod
    def of(cls, module: nn.BatchNorm2d | nn.SyncBatchNorm) -> "BatchNorm":
        """The module's parameters and buffers; counts a batch if it is training, as its own forward would.

        A SyncBatchNorm's statistics are over its process group, on any device.
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
            _group_name(module),
        )

    def check(self, channels: int, name: str) -> None:
        """Raises ValueError unless the parameters are for so many channels and eps is positive."""
        if self.weight.shape != (channels,):
            raise ValueError(f"{name}: got {self.weight.shape[0]} channels, must be for {channels}")
        if not self.eps > 0:
            raise ValueError(f"{name}.eps: got {self.eps}, must be positive")

    def eager(self, y: Tensor) -> Tensor:
        """PyTorch's own batch norm of y; over a group, what its batches together have."""
        if self.group and self.training:
            return self._eager_over_group(y)
        return F.batch_norm(
            y, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def _eager_over_group(self, y: Tensor) -> Tensor:
        group = _processes(self.group)
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        count = all_reduce(wide.new_tensor(values_per_channel(y)), group=group)
        mean = all_reduce(wide.sum((0, 2, 3)), group=group) / count
        centered = wide - mean[:, None, None]
        m2 = all_reduce(centered.square().sum((0, 2, 3)), group=group)
        _move_running([self], [mean.detach(), m2.detach() / (count - 1).clamp(min=1)])
        scale = self.weight * (m2 / count + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(y.dtype)

    def running(self) -> Norm:
        """The norm that the running statistics make, in float32 at least."""
        floats = torch.promote_types(self.running_mean.dtype, torch.float32)
        return Norm.make(self.running_mean.to(floats), self.running_var.to(floats), self.weight, self.bias, self.eps)


def update_running(norms: Sequence[BatchNorm], stats: Sequence[Tensor]) -> None:
    """Move running statistics as torch does: towards the mean and the unbiased variance.

    stats: [5, C] from `batch_stats`, for each of the norms.
    """
    _move_running(norms, [of_channels[row] for of_channels in stats for row in (2, 4)])


@torch.no_grad()
def _move_running(norms: Sequence[BatchNorm], towards: Sequence[Tensor]) -> None:
    """towards: mean and unbiased variance for each of the norms."""
    running = [t for bn in norms for t in (bn.running_mean, bn.running_var)]
    momenta = [bn.momentum for bn in norms for _ in range(2)]
    # one call for all of a block's, 9 us instead of 19
    torch._foreach_lerp_(running, [t.to(r.dtype) for t, r in zip(towards, running, strict=True)], momenta)


def batch_stats(
    passes: Any, moments: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor, eps: float, count: int, group: str = ""
) -> Tensor:
    """A training BatchNorm over `count` values a channel, from a pass's mean and m2; over all of a group's.

    Returns [5, C]: scale, shift, mean, rstd (the fields of `Norm`), and the unbiased variance.
    """
    if not group:
        return passes.batch_norm_stats(*moments, weight, bias, eps, count)
    mean, var, unbiased = _over_group(*moments, count, group)
    return torch.stack([*Norm.make(mean, var, weight, bias, eps), unbiased])


def _over_group(mean: Tensor, m2: Tensor, count: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased and unbiased variance of all processes' values together (Chan et al. 1979)."""
    own = torch.stack([mean, m2, torch.full_like(mean, count)])
    processes = _processes(group)
    parts = own.new_empty(processes.size() * len(own), own.shape[1])
    dist.all_gather_into_tensor(parts, own, group=processes)
    means, m2s, counts = parts.view(-1, *own.shape).unbind(1)
    total = counts.sum(0)
    mean = (means * (counts / total)).sum(0)
    m2 = (m2s + counts * (means - mean).square()).sum(0)
    return mean, m2 / total, m2 / (total - 1).clamp(min=1)


class NormGrad(NamedTuple):
    """Gradients of weight and bias [2, C], and the terms of `backward_apply`: dy = du * scale + (y - mean) * b + a."""

    affine: Tensor
    a: Tensor
    b: Tensor


def batch_norm_grad(
    passes: Any,
    stats: Tensor,
    sums: Tensor,
    gate: Tensor | None,
    pooled_grad: Tensor | None,
    count: int,
    group: str = "",
) -> NormGrad:
    """Backward of a training BatchNorm over `count` values a channel, from the sums of `backward_sums`.

    Over a group, a and b are of all processes' sums; the gradients of weight and bias are the own ones, as of any
    parameter.
    """
    if not group:
        grads = passes.batch_norm_grad(stats, sums, gate, pooled_grad, count)
        return NormGrad(grads[:2], grads[2], grads[3])
    own = sums_of_du(sums, gate, pooled_grad)
    totals = torch.cat([own.flatten(), own.new_tensor([count])])
    dist.all_reduce(totals, group=_processes(group))
    return NormGrad(own.flip(0), *mean_terms(stats, totals[:-1].view_as(own) / totals[-1]))


def _group_name(module: nn.Module) -> str:
    """Of the processes that a SyncBatchNorm is over; "" if there is but one, or for any other module."""
    if not isinstance(module, nn.SyncBatchNorm) or not (dist.is_available() and dist.is_initialized()):
        return ""
    group = module.process_group or dist.group.WORLD
    return group.group_name if group.size() > 1 else ""


def _processes(group: str) -> ProcessGroup:
    """By name: an op takes no other argument that says so."""
    return _resolve_process_group(GroupName(group))


def values_per_channel(x: Tensor) -> int:
    """How many values of [N, C, H, W] a channel's statistics are over."""
    return x.numel() // x.shape[1]
