"""The whole MBConv block as one op: expand, section, project, BatchNorm, drop path and residual."""

from typing import Any

import torch
from torch import Tensor

from effnet_fast.ops import section as sections
from effnet_fast.ops.activations import as_activation, channels_last
from effnet_fast.ops.bn_act import branch_gate
from effnet_fast.ops.conv_bn_act import (
    as_product,
    conv_bn_act,
    convolution_backend,
    convolution_grads,
)
from effnet_fast.ops.fused_op import fused_op
from effnet_fast.ops.memory_policy import Memory, check_memory
from effnet_fast.ops.normalization import BatchNorm, batch_norm_grad, batch_stats, update_running, values_per_channel
from effnet_fast.ops.squeeze_excite import SqueezeExcite
from effnet_fast.passes.algebra import Norm
from effnet_fast.passes.backend import cpu_isa, passes_for, resolve
from effnet_fast.passes.products import identity
from effnet_fast.passes.reference import dwconv
from effnet_fast.passes.schema import convolution_output

# Of a map whose expansion is swept, at least: of smaller ones the passes are quicker (figures in csrc/cpu/sweeps.h).
SWEPT_PIXELS = 28 * 28


def mbconv(
    x: Tensor,
    w_expand: Tensor | None,
    bn1: BatchNorm | None,
    w_depthwise: Tensor,
    bn2: BatchNorm,
    se: SqueezeExcite,
    w_project: Tensor,
    bn3: BatchNorm,
    *,
    expand_stride: int = 1,
    stride: int = 1,
    same: bool = False,
    residual: bool = False,
    branch_scale: Tensor | None = None,
    memory: Memory = "fast",
) -> Tensor:
    """An MBConv block (EfficientNet, Tan & Le 2019, table 1): [N, C_in, H, W] to [N, C_out, H', W'], channels_last.

    w_expand [E, C_in, 1, 1] and bn1: None for a block without expansion (E = C_in). Or [E, C_in, k, k] with
    expand_stride, without residual: EfficientNet's stem is its first block's expansion.
    w_depthwise [E, 1, k, k]; w_project [C_out, E, 1, 1].
    same: TensorFlow's SAME padding, else k // 2 on every side.
    residual: add x. branch_scale [N]: factor of the branch before the addition (drop path).

    memory: what training keeps for backward besides x: "fast" the outputs of all three convolutions, e, y and p; "lean"
    y and p, but no p without a 1x1 expansion, where p is large and soon computed; "min" nothing. The rest is computed
    again, from the same statistics: gradients are the same, bit for bit. e is not even kept by "fast" where it never
    exists: bf16 maps of 28 px and up, on a CPU with AMX.
    BatchNorm's running statistics are updated in training. Not twice differentiable. Gradients in eval mode, and calls
    that no native backend can run, take `mbconv_eager`, which keeps what autograd keeps.
    Raises ValueError that names the argument, or RuntimeError if a backend was insisted on and can't run the call.
    """
    x = as_activation(
        x,
        "x",
        w_expand=w_expand,
        bn1=None if bn1 is None else bn1.weight,
        w_depthwise=w_depthwise,
        bn2=bn2.weight,
        se=se.w_reduce,
        w_project=w_project,
        bn3=bn3.weight,
    )
    check_memory(memory)
    _check(x, w_expand, bn1, w_depthwise, bn2, se, w_project, bn3, residual, stride)
    norms = [bn2, bn3] if bn1 is None else [bn1, bn2, bn3]
    training = bn2.training
    alike = all((bn.training, bn.group) == (training, bn2.group) for bn in norms)
    plain = not alike or resolve(_as_expanded(x, w_expand), w_depthwise.shape[-1], stride) == "eager"
    if w_expand is not None and bn1 is not None and not _is_pointwise(w_expand):
        native = x.device.type == "cpu" and convolution_backend(x, w_expand, expand_stride) != "eager"
        if plain or not training or not native:
            e = conv_bn_act(x, w_expand, bn1, stride=expand_stride, same=same, memory=memory)
            rest: dict[str, Any] = {"stride": stride, "same": same, "branch_scale": branch_scale, "memory": memory}
            return mbconv(e, None, None, w_depthwise, bn2, se, w_project, bn3, **rest)
    operands = (x, w_expand, bn1, w_depthwise, bn2, se, w_project, bn3)
    needs_grad = torch.is_grad_enabled() and any(
        t.requires_grad for t in (x, w_depthwise, w_project, *se, *(p for bn in norms for p in (bn.weight, bn.bias)))
    )
    if plain or (needs_grad and not training):
        return mbconv_eager(*operands, stride=stride, same=same, residual=residual, branch_scale=branch_scale)
    if not training:
        return _inference(*operands, stride, same, residual, branch_scale)
    out, _, _, _, stats1, stats2, stats3, _, _ = _mbconv(
        x,
        w_expand,
        bn1.weight if bn1 else None,
        bn1.bias if bn1 else None,
        bn1.eps if bn1 else 0.0,
        w_depthwise,
        bn2.weight,
        bn2.bias,
        bn2.eps,
        *se,
        w_project,
        bn3.weight,
        bn3.bias,
        bn3.eps,
        None if branch_scale is None else branch_scale.float().contiguous(),
        expand_stride,
        stride,
        same,
        residual,
        memory,
        bn2.group,
    )
    update_running(norms, [stats2, stats3] if bn1 is None else [stats1, stats2, stats3])
    return out


def mbconv_eager(
    x: Tensor,
    w_expand: Tensor | None,
    bn1: BatchNorm | None,
    w_depthwise: Tensor,
    bn2: BatchNorm,
    se: SqueezeExcite,
    w_project: Tensor,
    bn3: BatchNorm,
    *,
    stride: int = 1,
    same: bool = False,
    residual: bool = False,
    branch_scale: Tensor | None = None,
) -> Tensor:
    """`mbconv` in plain PyTorch: its fallback, oracle and baseline."""
    silu, conv = torch.nn.functional.silu, torch.nn.functional.conv2d
    e = x if w_expand is None or bn1 is None else silu(bn1.eager(conv(x, w_expand)))
    z = silu(bn2.eager(dwconv(e, w_depthwise, stride, same)))
    branch = bn3.eager(conv(se.eager(z), w_project))
    if branch_scale is not None:
        branch = branch * branch_scale.to(branch.dtype)[:, None, None, None]
    return x + branch if residual else branch


def _inference(
    x: Tensor,
    w_expand: Tensor | None,
    bn1: BatchNorm | None,
    w_depthwise: Tensor,
    bn2: BatchNorm,
    se: SqueezeExcite,
    w_project: Tensor,
    bn3: BatchNorm,
    stride: int,
    same: bool,
    residual: bool,
    branch_scale: Tensor | None,
) -> Tensor:
    passes = passes_for(x, w_depthwise.shape[-1], stride)
    expanded = x
    if w_expand is not None and bn1 is not None:
        expanded = passes.pointwise_affine(x, w_expand, None, *bn1.running()[:2], True, None)
    z, pooled = passes.dwconv_affine(expanded, w_depthwise, None, None, *bn2.running()[:2], stride, same)
    gate = passes.squeeze_gate(pooled, z.shape[2] * z.shape[3], *se, z.dtype)[1]
    if branch_scale is None:
        return passes.pointwise_affine(z, w_project, gate, *bn3.running()[:2], False, x if residual else None)
    p, _, _ = passes.pointwise_stats(z, w_project, None, None, gate)
    return passes.apply(p, *bn3.running()[:2], False, branch_gate(branch_scale, p), x if residual else None)


def _forward(
    x: Tensor,
    w_expand: Tensor | None,
    bn1_weight: Tensor | None,
    bn1_bias: Tensor | None,
    bn1_eps: float,
    w_depthwise: Tensor,
    bn2_weight: Tensor,
    bn2_bias: Tensor,
    bn2_eps: float,
    w_se_reduce: Tensor,
    b_se_reduce: Tensor,
    w_se_expand: Tensor,
    b_se_expand: Tensor,
    w_project: Tensor,
    bn3_weight: Tensor,
    bn3_bias: Tensor,
    bn3_eps: float,
    branch_scale: Tensor | None,
    expand_stride: int,
    stride: int,
    same: bool,
    residual: bool,
    memory: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, e, y, p (empty if not kept), stats1, stats2, stats3, squeeze (`section.Kept`), moments (`expand_stats`)."""
    passes = passes_for(_as_expanded(x, w_expand), w_depthwise.shape[-1], stride)
    sweep = _sweeps(x, w_expand, group)
    keeps = _kept(memory, w_expand, sweep)
    source, matrix = _as_pointwise(passes, x, w_expand, expand_stride, same)
    if _in_one_call(passes, x, group):
        out, e, y, p, *others = passes.block_forward(
            source, matrix, bn1_weight, bn1_bias, bn1_eps, w_depthwise, bn2_weight, bn2_bias, bn2_eps, w_se_reduce,
            b_se_reduce, w_se_expand, b_se_expand, w_project, bn3_weight, bn3_bias, bn3_eps, branch_scale, stride, same,
            residual, sweep,
        )  # fmt: skip
        return out, *_those_kept(keeps, e, y, p), *others
    e, stats1, moments = source, None, bn2_weight.new_empty(0, dtype=torch.float32)
    if matrix is not None and bn1_weight is not None and bn1_bias is not None:
        if sweep:
            *of_e, moments = passes.expand_stats(source, matrix)
        else:
            e, *of_e = passes.pointwise_stats(source, matrix, None, None, None)
        stats1 = batch_stats(passes, of_e, bn1_weight, bn1_bias, bn1_eps, values_per_channel(e), group)
    se = SqueezeExcite(w_se_reduce, b_se_reduce, w_se_expand, b_se_expand)
    bn2, swept = (bn2_weight, bn2_bias, bn2_eps), matrix if sweep else None
    kept = sections.forward(passes, e, stats1, w_depthwise, bn2, se, stride, same, group, swept)
    p, *of_p = passes.pointwise_stats(kept.y, w_project, kept.stats2[0], kept.stats2[1], kept.gate)
    stats3 = batch_stats(passes, of_p, bn3_weight, bn3_bias, bn3_eps, values_per_channel(p), group)
    gate = branch_gate(branch_scale, p)
    out = passes.apply(p, stats3[0], stats3[1], False, gate, x if residual else None)
    return out, *_those_kept(keeps, e, kept.y, p), kept.stats1, kept.stats2, stats3, kept.squeeze, moments


def _sweeps(x: Tensor, w_expand: Tensor | None, group: str) -> bool:
    """Whether e is never stored: where the sweeps are no slower, each thread with images of its own."""
    if not _is_pointwise(w_expand) or group or x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return False
    large = x.shape[2] * x.shape[3] >= SWEPT_PIXELS and len(x) >= torch.get_num_threads()
    return large and cpu_isa() == "amx"


def _in_one_call(passes: Any, x: Tensor, group: str) -> bool:
    """Whether the backend runs the whole block: not over a process group, nor where those between the passes are to be
    seen, by a profiler or of fake tensors (`planning.py`)."""
    if passes.block_forward is None or group or type(x) is not Tensor:
        return False
    return not torch.autograd._profiler_enabled()


def _kept(memory: str, w_expand: Tensor | None, sweep: bool) -> tuple[bool, bool, bool]:
    """Whether e, y and p are kept for backward; e is x itself without expansion."""
    fast, lean = memory == "fast", memory == "lean"
    return fast and w_expand is not None and not sweep, fast or lean, fast or (lean and _is_pointwise(w_expand))


def _those_kept(keeps: tuple[bool, bool, bool], e: Tensor, y: Tensor, p: Tensor) -> list[Tensor]:
    """e, y and p, empty if not kept."""
    return [t if kept else t.new_empty(0) for t, kept in zip((e, y, p), keeps, strict=True)]


def _is_pointwise(w_expand: Tensor | None) -> bool:
    return w_expand is not None and w_expand.shape[-1] == 1


def _as_expanded(x: Tensor, w_expand: Tensor | None) -> Tensor:
    """Something of e's channels, where x may have others than multiples of 8."""
    return x if w_expand is None or _is_pointwise(w_expand) else x.new_empty(0, len(w_expand), 1, 1)


def _as_pointwise(
    passes: Any, x: Tensor, w_expand: Tensor | None, stride: int, same: bool
) -> tuple[Tensor, Tensor | None]:
    """The input and the weight of a 1x1 expansion that is the same."""
    return (x, None) if w_expand is None else as_product(passes, x, w_expand, stride, same)


def _fake(
    x, w_expand, bn1_weight, bn1_bias, bn1_eps, w_depthwise, bn2_weight, bn2_bias, bn2_eps, w_se_reduce, b_se_reduce,
    w_se_expand, b_se_expand, w_project, bn3_weight, bn3_bias, bn3_eps, branch_scale, expand_stride, stride, same,
    residual, memory, group,
):  # fmt: skip
    e = x if w_expand is None else convolution_output(x, w_expand, expand_stride, same)
    y = convolution_output(e, w_depthwise, stride, same)
    p = convolution_output(y, w_project)
    stats1, stats2, squeeze = sections.fake_stats(e, w_expand is not None, True)
    stats3 = stats2.new_empty(5, p.shape[1])
    sweep = _sweeps(x, w_expand, group)
    kept = _those_kept(_kept(memory, w_expand, sweep), e, y, p)
    moments = x.new_empty((1 + x.shape[1], x.shape[1]) if sweep else 0, dtype=torch.float32)
    return torch.empty_like(p), *kept, stats1, stats2, stats3, squeeze, moments


def _backward(
    dout: Tensor,
    x: Tensor,
    e: Tensor,
    y: Tensor,
    p: Tensor,
    stats1: Tensor,
    stats2: Tensor,
    stats3: Tensor,
    squeeze: Tensor,
    moments: Tensor,
    w_expand: Tensor | None,
    w_depthwise: Tensor,
    w_se_reduce: Tensor,
    b_se_reduce: Tensor,
    w_se_expand: Tensor,
    b_se_expand: Tensor,
    w_project: Tensor,
    branch_scale: Tensor | None,
    expand_stride: int,
    stride: int,
    same: bool,
    residual: bool,
    group: str,
    input_grad: bool,
) -> list[Tensor]:
    """Gradients of x (empty unless asked for), bn3 [2, C] (weight, bias), bn2, w_project, w_depthwise, se, and with
    expansion w_expand, bn1. To be asked for without expansion, and with residual."""
    passes = passes_for(_as_expanded(x, w_expand), w_depthwise.shape[-1], stride)
    dout = channels_last(dout)
    source, matrix = _as_pointwise(passes, x, w_expand, expand_stride, same)
    swept = moments.numel() > 0
    e, y, p = _recompute(
        passes, source, e, y, p, stats1, stats2, squeeze, matrix, w_depthwise, w_project, stride, same, swept
    )
    if _in_one_call(passes, x, group):
        dsource, dbn3, dbn2, dw_project, dw_depthwise, *dse, dmatrix, dbn1 = passes.block_backward(
            dout, source, e, y, p, stats1, stats2, stats3, squeeze, moments, matrix, w_depthwise, w_se_reduce,
            b_se_reduce, w_se_expand, b_se_expand, w_project, branch_scale, stride, same, residual, input_grad,
        )  # fmt: skip
        weights = (w_project, w_depthwise, w_se_reduce, b_se_reduce, w_se_expand, b_se_expand)
        dweights = [d.to(w.dtype) for d, w in zip((dw_project, dw_depthwise, *dse), weights, strict=True)]
        shared = [dbn3, dbn2, *dweights]
    else:
        norm2, norm3 = Norm.of(stats2), Norm.of(stats3)
        kept = sections.Kept(y, stats1, stats2, squeeze)
        gate = branch_gate(branch_scale, p)
        sums = passes.backward_sums(dout, p, *norm3, False)
        grad3 = batch_norm_grad(passes, stats3, sums, gate, None, values_per_channel(p), group)
        do, dw_project, sums2 = passes.backward_pointwise(
            dout, p, y, w_project, *norm3[:3], False, gate, grad3.a, grad3.b, *norm2, kept.gate, None, True
        )
        se, added = SqueezeExcite(w_se_reduce, b_se_reduce, w_se_expand, b_se_expand), dout if residual else None
        grad: sections.SectionGrad | sections.SweptGrad
        if swept:
            grad = sections.backward_swept(
                passes, do, sums2, source, matrix, moments, kept, w_depthwise, se, added, stride, same
            )
            dsource, dmatrix, dbn1 = grad.dx, grad.expand, grad.bn1
        else:
            grad = sections.backward(passes, do, sums2, e, kept, w_depthwise, se, stride, same, group)
            if matrix is None:
                dsource = grad.g + dout if residual else grad.g
            else:
                norm1, none = Norm.of(stats1), (None,) * 5
                dsource, dmatrix, _ = passes.backward_pointwise(
                    grad.g, e, source, matrix, *norm1[:3], False, None, grad.bn1.a, grad.bn1.b, *none, added, input_grad
                )
                dbn1 = grad.bn1.affine
        shared = [grad3.affine, grad.bn2.affine, dw_project.to(w_project.dtype), grad.weight, *grad.se]
    if w_expand is None:
        return [dsource, *shared]
    dx, dw_expand = convolution_grads(dsource, dmatrix, x, w_expand, expand_stride, same, input_grad)
    return [dx, *shared, dw_expand, dbn1]


def _recompute(
    passes: Any,
    x: Tensor,
    e: Tensor,
    y: Tensor,
    p: Tensor,
    stats1: Tensor,
    stats2: Tensor,
    squeeze: Tensor,
    w_expand: Tensor | None,
    w_depthwise: Tensor,
    w_project: Tensor,
    stride: int,
    same: bool,
    swept: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """e (x without expansion, empty if swept), y and p: those kept, and the others as the forward pass made them."""
    if w_expand is None:
        e = x
    elif not e.numel() and not swept:
        e = passes.pointwise_affine(x, w_expand, None, *identity(x.new_empty(0, w_expand.shape[0])), False, None)
    if not y.numel():
        scale, shift = stats1[:2].unbind() if w_expand is not None else (None, None)
        if swept:
            y, _, _ = passes.expand_dwconv_stats(x, w_expand, scale, shift, w_depthwise, stride, same)
        else:
            y, _, _ = passes.dwconv_stats(e, w_depthwise, scale, shift, stride, same)
    if not p.numel():
        p, _, _ = passes.pointwise_stats(y, w_project, stats2[0], stats2[1], squeeze[1])
    return e, y, p


def _backward_fake(
    dout, x, e, y, p, stats1, stats2, stats3, squeeze, moments, w_expand, w_depthwise, w_se_reduce, b_se_reduce,
    w_se_expand, b_se_expand, w_project, branch_scale, expand_stride, stride, same, residual, group, input_grad,
):  # fmt: skip
    weights = [w_project, w_depthwise, w_se_reduce, b_se_reduce, w_se_expand, b_se_expand]
    like = [x if input_grad else x.new_empty(0), stats3[:2], stats2[:2], *weights]
    like += [] if w_expand is None else [w_expand, stats1[:2]]
    return [torch.empty_like(t) for t in like]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        x, w_expand, _, _, _, w_depthwise, _, _, _, *se, w_project, _, _, _, branch_scale, expand_stride, stride, same,
        residual, _, group,
    ) = inputs  # fmt: skip
    ctx.save_for_backward(x, *output[1:], w_expand, w_depthwise, *se, w_project, branch_scale)
    ctx.options = expand_stride, stride, same, residual, group
    ctx.passes_x = residual or w_expand is None


def _gradients(run: Any, ctx: Any, dout: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 24
    grads = run(dout, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[0] or ctx.passes_x)
    dx, dbn3, dbn2, dw_project, dw_depthwise, *dse = grads[:9]
    dw_expand, dbn1 = grads[9:] or (None, (None, None))
    return (
        dx if ctx.needs_input_grad[0] else None, dw_expand, *dbn1, None, dw_depthwise, *dbn2, None, *dse, dw_project,
        *dbn3, *(None,) * 8,
    )  # fmt: skip


_mbconv = fused_op("mbconv", _forward, _fake, _backward, _backward_fake, _setup_context, _gradients)


def _check(
    x: Tensor,
    w_expand: Tensor | None,
    bn1: BatchNorm | None,
    w_depthwise: Tensor,
    bn2: BatchNorm,
    se: SqueezeExcite,
    w_project: Tensor,
    bn3: BatchNorm,
    residual: bool,
    stride: int,
) -> None:
    expanded = w_depthwise.shape[0]
    dense = w_expand is not None and not _is_pointwise(w_expand)
    if (w_expand is None) != (bn1 is None):
        raise ValueError("bn1: must be given with w_expand, and only with it")
    expected = (expanded if w_expand is None else w_expand.shape[1], "w_depthwise" if w_expand is None else "w_expand")
    if x.shape[1] != expected[0]:
        raise ValueError(f"x: got {x.shape[1]} channels, {expected[1]} takes {expected[0]}")
    for name, weight, channels in (("w_project", w_project, expanded), ("se.w_reduce", se.w_reduce, expanded)):
        if weight.shape[1] != channels:
            raise ValueError(f"{name}: takes {weight.shape[1]} channels, w_depthwise gives {channels}")
    if bn1 is not None:
        bn1.check(expanded, "bn1")
    bn2.check(expanded, "bn2")
    bn3.check(w_project.shape[0], "bn3")
    if residual and (dense or stride != 1 or w_project.shape[0] != x.shape[1]):
        raise ValueError(f"residual: needs stride 1, {x.shape[1]} output channels, and a 1x1 expansion if any")
