"""The building blocks of EfficientNet, with the parameters of Conv2d, BatchNorm2d and squeeze-excite's convolutions."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from effnet_fast import ops
from effnet_fast.passes.reference import same_padding

PadType = Literal["symmetric", "same"]


class Conv2dSame(nn.Conv2d):
    """Conv2d with TensorFlow's SAME padding: ceil(size / stride) outputs, the odd pixel of padding at the end."""

    def forward(self, x: Tensor) -> Tensor:
        sides = zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True)
        pad = [pixels for side in sides for pixels in same_padding(*side)]
        return F.conv2d(F.pad(x, pad), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class ConvBN(nn.Module):
    """Convolution without bias, BatchNorm, and SiLU unless `act` is False. [N, C_in, H, W] to [N, C_out, H', W'].

    After `fuse`, the convolution has a bias and `bn` is None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        *,
        act: bool = True,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        pad_type: PadType = "symmetric",
        memory: ops.Memory = "fast",
    ) -> None:
        super().__init__()
        same = pad_type == "same" and kernel_size > 1
        self.conv = (Conv2dSame if same else nn.Conv2d)(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=0 if same else kernel_size // 2,
            groups=groups,
            bias=False,
        )
        self.bn: nn.BatchNorm2d | None = nn.BatchNorm2d(out_channels, eps=bn_eps, momentum=bn_momentum)
        self.act = act
        self.memory: ops.Memory = memory

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold the BatchNorm's running statistics and affine into the convolution; its parameters are then frozen."""
        if self.bn is None:
            return
        conv, bn = self.conv, self.bn
        norm = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
        mean, var, scale, shift = (t.double() for t in norm)  # rounded once, in whatever dtype the model is
        folded = fuse_conv_bn_weights(conv.weight.double(), None, mean, var, bn.eps, scale, shift)
        conv.weight, conv.bias = (nn.Parameter(p.to(conv.weight.dtype), requires_grad=False) for p in folded)
        self.bn = None

    def operands(self) -> ops.Convolution:
        """The folded parameters as the ops take them."""
        return ops.Convolution(self.conv.weight, self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        window: dict[str, Any] = {"stride": self.conv.stride[0], "same": isinstance(self.conv, Conv2dSame)}
        if self.bn is None:
            return ops.conv_folded(x, self.operands(), silu=self.act, **window)
        bn = ops.BatchNorm.of(self.bn)
        if self.conv.groups > 1:
            return ops.bn_act(self.conv(x), bn, silu=self.act)
        return ops.conv_bn_act(x, self.conv.weight, bn, silu=self.act, memory=self.memory, **window)


class SqueezeExcite(nn.Module):
    """Gate each channel by a two-layer MLP of the channels' means (Hu et al. 2018). Keeps the shape."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def operands(self) -> ops.SqueezeExcite:
        """The parameters as the ops take them."""
        return ops.SqueezeExcite(self.reduce.weight, self.reduce.bias, self.expand.weight, self.expand.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.operands().eager(x)


def drop_path_scale(batch: int, rate: float, like: Tensor) -> Tensor:
    """Per-example factor of a residual branch: 0 with probability `rate`, else 1 / (1 - rate). [batch], float32.

    Stochastic depth (Huang et al. 2016).
    """
    keep = 1.0 - rate
    return torch.empty(batch, device=like.device).bernoulli_(keep).div_(keep)


class MBConv(nn.Module):
    """Inverted residual with squeeze-excite: expand, depthwise, gate, project (paper, table 1).

    [N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)]. The input is added where the
    shapes allow it; in training, drop path drops the branch per example. The whole block is one op, so that hooks on
    its parts do not run.

    In training the model's first block takes the stem for its expansion, so that what is between them is neither
    written nor kept; the stem's own hooks do not run then either.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        expand_ratio: int,
        se_channels: int,
        *,
        drop_path_rate: float = 0.0,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        pad_type: PadType = "symmetric",
        memory: ops.Memory = "fast",
    ) -> None:
        super().__init__()
        expanded = in_channels * expand_ratio
        norm: dict[str, Any] = {"bn_eps": bn_eps, "bn_momentum": bn_momentum}
        self.expand = ConvBN(in_channels, expanded, 1, **norm) if expand_ratio > 1 else None
        self.depthwise = ConvBN(expanded, expanded, kernel_size, stride, expanded, pad_type=pad_type, **norm)
        self.se = SqueezeExcite(expanded, se_channels)
        self.project = ConvBN(expanded, out_channels, 1, act=False, **norm)
        self.has_residual = stride == 1 and in_channels == out_channels
        self.drop_path_rate = drop_path_rate
        self.memory: ops.Memory = memory

    def forward(self, x: Tensor, stem: ConvBN | None = None) -> Tensor:
        expand, depthwise, se, project = self.expand, self.depthwise, self.se.operands(), self.project
        if stem is not None:
            if self.training and stem.training and torch.is_grad_enabled() and not self.has_residual:
                expand = stem
            else:
                x = stem(x)
        conv, bn = depthwise.conv, depthwise.bn
        window: dict[str, Any] = {
            "stride": conv.stride[0],
            "same": isinstance(conv, Conv2dSame),
            "residual": self.has_residual,
        }
        if bn is None:
            expand_operands = expand.operands() if expand else None
            return ops.mbconv_folded(x, expand_operands, depthwise.operands(), se, project.operands(), **window)
        branch_scale = None
        if self.has_residual and self.training and self.drop_path_rate > 0:
            branch_scale = drop_path_scale(len(x), self.drop_path_rate, x)
        return ops.mbconv(
            x,
            expand.conv.weight if expand else None,
            ops.BatchNorm.of(expand.bn) if expand else None,
            conv.weight,
            ops.BatchNorm.of(bn),
            se,
            project.conv.weight,
            ops.BatchNorm.of(project.bn),
            branch_scale=branch_scale,
            expand_stride=expand.conv.stride[0] if expand else 1,
            memory=self.memory,
            **window,
        )


class MBConvStage(nn.Sequential):
    """MBConv blocks in a row, the first of which takes the stem if there is one."""

    def forward(self, x: Tensor, stem: ConvBN | None = None) -> Tensor:
        for block in self:
            x, stem = block(x, stem), None
        return x


class StemBlock(nn.Module):
    """The stem with the first block."""

    def __init__(self, stem: ConvBN, block: MBConv) -> None:
        super().__init__()
        self.stem = stem
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, self.stem)
