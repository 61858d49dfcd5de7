"""A dense convolution with BatchNorm and SiLU after it: EfficientNet's stem (3x3, few channels) and head (1x1)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effnet_fast.ops.activations import as_activation, channels_last
from effnet_fast.ops.bn_act import bn_act, bn_act_eager
from effnet_fast.ops.fused_op import fused_op
from effnet_fast.ops.memory_policy import Memory, check_memory
from effnet_fast.ops.normalization import BatchNorm, batch_norm_grad, batch_stats, update_running, values_per_channel
from effnet_fast.passes.algebra import Norm
from effnet_fast.passes.backend import passes_for, resolve
from effnet_fast.passes.products import patches_grad, window_padding
from effnet_fast.passes.schema import convolution_output


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bn: BatchNorm,
    *,
    stride: int = 1,
    same: bool = False,
    silu: bool = True,
    memory: Memory = "fast",
) -> Tensor:
    """SiLU(bn(convolution of x)), or without the SiLU: [N, C_in, H, W] to [N, C_out, H', W'], channels_last.

    weight [C_out, C_in, k, k]; same: TensorFlow's SAME padding, else k // 2 on every side. On the CPU the convolution
    is a matrix product, for k > 1 over patches of x; on other devices it is PyTorch's, and `bn_act` follows.
    In training, kept for backward are x and, unless memory is "min", the convolution's output; bn's running statistics
    are updated. Not twice differentiable. Gradients in eval mode, and calls that no native backend can run, take
    `conv_bn_act_eager`.
    Raises ValueError that names the argument, or RuntimeError if a backend was insisted on and can't run the call.
    """
    x = as_activation(x, "x", weight=weight, bn=bn.weight)
    check_memory(memory)
    if weight.dim() != 4 or weight.shape[1] != x.shape[1] or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, must be [C_out, {x.shape[1]}, k, k]")
    bn.check(weight.shape[0], "bn")
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bn.weight, bn.bias))
    if convolution_backend(x, weight, stride) == "eager" or (needs_grad and not bn.training):
        return conv_bn_act_eager(x, weight, bn, stride=stride, same=same, silu=silu)
    if x.device.type != "cpu":
        return bn_act(convolve(x, weight, None, stride, same), bn, silu=silu)
    if not bn.training:
        passes = passes_for(x.new_empty(0, weight.shape[0], 1, 1))
        source, matrix = as_product(passes, x, weight, stride, same)
        return passes.pointwise_affine(source, matrix, None, *bn.running()[:2], silu, None)
    out, _, stats = _conv_bn_act(x, weight, bn.weight, bn.bias, bn.eps, stride, same, silu, bn.group, memory)
    update_running([bn], [stats])
    return out


def conv_bn_act_eager(
    x: Tensor, weight: Tensor, bn: BatchNorm, *, stride: int = 1, same: bool = False, silu: bool = True
) -> Tensor:
    """`conv_bn_act` in plain PyTorch: its fallback, oracle and baseline."""
    return bn_act_eager(convolve(x, weight, None, stride, same), bn, silu=silu)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, same: bool, groups: int = 1) -> Tensor:
    """PyTorch's convolution with symmetric or SAME padding."""
    kernel = weight.shape[-1]
    padding = kernel // 2
    if same:
        x, padding = F.pad(x, window_padding(x, kernel, stride, same)), 0
    return F.conv2d(x, weight, bias, stride, padding, groups=groups)


def convolution_backend(x: Tensor, weight: Tensor, stride: int) -> str:
    """The backend of the output, and of the input unless patches are made of it."""
    out_channels, _, kernel, _ = weight.shape
    y = x.new_empty(0, out_channels, 1, 1)
    if kernel > 1:
        return resolve(y, kernel, stride)
    return "eager" if stride > 1 or resolve(x) == "eager" else resolve(y)


def as_product(passes: Any, x: Tensor, weight: Tensor, stride: int, same: bool) -> tuple[Tensor, Tensor]:
    """The input and the weight [C_out, C, 1, 1] of a 1x1 convolution that is the same."""
    kernel = weight.shape[-1]
    return x if kernel == 1 else passes.patches(x, kernel, stride, same), as_pointwise(weight)


def as_pointwise(weight: Tensor) -> Tensor:
    """The weight [C_out, C, 1, 1] of the 1x1 convolution of `patches`, or the weight itself if it is one."""
    if weight.shape[-1] == 1:
        return weight
    matrix = weight.permute(0, 2, 3, 1).flatten(1)
    return F.pad(matrix, (0, -matrix.shape[1] % 8))[:, :, None, None]


def _forward(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    eps: float,
    stride: int,
    same: bool,
    silu: bool,
    group: str,
    memory: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, y (empty if not kept), stats."""
    passes = passes_for(x.new_empty(0, weight.shape[0], 1, 1))
    y, *moments = passes.pointwise_stats(*as_product(passes, x, weight, stride, same), None, None, None)
    stats = batch_stats(passes, moments, bn_weight, bn_bias, eps, values_per_channel(y), group)
    out = passes.apply(y, stats[0], stats[1], silu, None, None)
    return out, x.new_empty(0) if memory == "min" else y, stats


def _fake(x, weight, bn_weight, bn_bias, eps, stride, same, silu, group, memory):
    out = convolution_output(x, weight, stride, same)
    floats = torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty(0) if memory == "min" else torch.empty_like(out)
    return out, y, x.new_empty(5, len(weight), dtype=floats)


def _backward(
    dout: Tensor,
    x: Tensor,
    y: Tensor,
    stats: Tensor,
    weight: Tensor,
    stride: int,
    same: bool,
    silu: bool,
    group: str,
    input_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty unless asked for), weight, and of bn's weight and bias [2, C]."""
    passes = passes_for(dout)
    dout, norm = channels_last(dout), Norm.of(stats)
    source, matrix = as_product(passes, x, weight, stride, same)
    if not y.numel():
        y, _, _ = passes.pointwise_stats(source, matrix, None, None, None)
    sums = passes.backward_sums(dout, y, *norm, silu)
    grad = batch_norm_grad(passes, stats, sums, None, None, values_per_channel(y), group)
    dsource, dmatrix, _ = passes.backward_pointwise(
        dout, y, source, matrix, *norm[:3], silu, None, grad.a, grad.b, *(None,) * 6, input_grad
    )
    return *convolution_grads(dsource, dmatrix, x, weight, stride, same, input_grad), grad.affine


def convolution_grads(
    dsource: Tensor, dmatrix: Tensor, x: Tensor, weight: Tensor, stride: int, same: bool, input_grad: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x (empty unless asked for) and weight from those of `as_product`'s operands."""
    out_channels, channels, kernel, _ = weight.shape
    dx = dsource if input_grad else x.new_empty(0)
    if kernel == 1:
        return dx, dmatrix.to(weight.dtype)
    if input_grad:
        dx = channels_last(patches_grad(dsource, x, kernel, stride, same))
    dweight = dmatrix[:, : channels * kernel**2, 0, 0].reshape(out_channels, kernel, kernel, channels)
    return dx, dweight.permute(0, 3, 1, 2).to(weight.dtype, memory_format=torch.contiguous_format)


def _backward_fake(dout, x, y, stats, weight, stride, same, silu, group, input_grad):
    dx = torch.empty_like(x) if input_grad else x.new_empty(0)
    return dx, torch.empty_like(weight, memory_format=torch.contiguous_format), torch.empty_like(stats[:2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, _, *options, _ = inputs
    ctx.save_for_backward(x, *output[1:], weight)
    ctx.options = options


def _gradients(run: Any, ctx: Any, dout: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 10
    input_grad = ctx.needs_input_grad[0]
    dx, dweight, affine = run(dout, *ctx.saved_tensors, *ctx.options, input_grad)
    return dx if input_grad else None, dweight, *affine, *(None,) * 6


_conv_bn_act = fused_op("conv_bn_act", _forward, _fake, _backward, _backward_fake, _setup_context, _gradients)
