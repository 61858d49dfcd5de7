"""The passes over an activation: one schema and one fake each. A backend implements the same schemas.

Shapes: x [N, C, H, W], y and grad [N, C, H', W'], all channels_last in one storage dtype (fp32, bf16 or fp16); every
other operand is float32, [C] unless stated. All accumulation is in float32, in a fixed order. u = y * scale + shift is
a BatchNorm's output, hat = (y - mean) * rstd its normalized input, d the derivative of SiLU at u.

channel_stats    per channel: mean, and sum of squared deviations (m2)
dwconv_stats     y = depthwise convolution of x, or of SiLU(x * scale + shift); mean and m2 of y
pool             [N, C] sums over H, W of SiLU(u), or of u
apply            SiLU(u) or u, times gate [N, C], plus residual [N, C, H, W]
backward_sums    [5, N, C] sums over H, W for SiLU: grad * SiLU(u), grad * d, d, grad * d * hat, d * hat;
                 [2, N, C] without it: grad, grad * hat
backward_apply   du * scale + (y - mean) * b + a, where du = (grad * gate + pooled_grad) * d, or without the d
backward_dwconv  g, the gradient of the convolution's input (times d of the input's BatchNorm + SiLU, if given), the
                 weight's gradient [C, 1, k, k], and [2, C] sums of g and g * hat. The gradient of the convolution's
                 output is `backward_apply` with SiLU, formed on load, or `grad` itself where scale is None.
dwconv_affine    inference: SiLU(dwconv * scale + shift), and its [N, C] sums over H, W; the input as in dwconv_stats

The 1x1 convolutions with what stands before and after them, which a backend may leave to `products`; weight is
[C_out, C_in, 1, 1]:

patches             x's pixels (kh, kw, channel) under each window of a small convolution, and zeros up to a multiple
                    of 8: [N, C_in, H', W'], whose 1x1 convolution is that convolution; x may have any channels
pointwise_stats     y = convolution of x, or of SiLU(x * scale + shift), either times gate [N, C_in]; mean and m2 of y
pointwise_affine    inference: SiLU(u) or u of the convolution of x, or of x times gate, plus residual
backward_pointwise  gradients of the convolution's input (plus residual) and weight, and, where the input is
                    SiLU(x * in_scale + in_shift) (times in_gate), `backward_sums` of that gradient and x, else an empty
                    [0, N, 0]. The gradient of the convolution's output is `backward_apply`, formed on load, or `grad`
                    itself where scale is None. Without input_grad, the input's gradient is of no images.

A 1x1 convolution, its BatchNorm + SiLU and the depthwise convolution after it in one sweep each way, which never store
the tensor between the two convolutions; a backend may leave them to `sweeps`, where they do:

expand_stats            mean and m2 of the convolution of x; moments [1 + C_in, C_in]: x's mean and its covariance
expand_dwconv_stats     y, mean and m2 of `dwconv_stats` of that convolution
backward_expand_dwconv  gradients of x (plus residual), of both weights and of the BatchNorm between them: [2, C], its
                        weight's and bias'. scale to b as in `backward_dwconv`, in_scale to in_rstd: that BatchNorm's

Between the passes, on [C] and [N, C], which a backend may leave to `algebra`:

batch_norm_stats    [5, C]: scale, shift, mean, rstd and the unbiased variance of a BatchNorm over `count` values a
                    channel, from their mean and m2
batch_norm_grad     [4, C]: gradients of its weight and bias, and a and b of `backward_apply`, from its statistics and
                    `backward_sums`; gate and pooled_grad as in `backward_apply`
squeeze_gate        [2, N, C]: the means that `pool` summed, and squeeze-excite's gate, a two-layer MLP of them. dtype:
                    the activations', to which the MLP's products may round what they multiply
squeeze_gate_grad   from the gate's gradient: `pooled_grad` of `backward_apply`, and the gradients of the MLP's weights

All of these that a block takes in one call, and products with weights that are laid out for them once. Backends may
lack them, compilers do not see them:

block_forward       out, e (empty without expansion, and with sweep: the block's expansion and depthwise convolution are
                    those of the sweeps), y and p, `batch_norm_stats` of the three, `squeeze_gate`, and moments
block_backward      gradients of x, bn3 [2, C] (weight, bias), bn2, w_project, w_depthwise, squeeze-excite's weights and
                    biases, w_expand and bn1 (empty without expansion); moments: not empty where it is the sweeps'
block_inference     a block with folded BatchNorms, of which the biases are left; expand and project as packed
pack_pointwise      the weight of a 1x1 convolution, laid out for inputs of like's dtype
packed_convolution  inference: SiLU(u) or u of a convolution, u = convolution + shift. panels: the packed weight, for a
                    kernel of more than 1 of the 1x1 convolution of `patches`

Over the weights, on the CPU alone, and in place:

rmsprop_step        torch's RMSprop with momentum; each weight's grad, square and velocity lie in memory as it does

Windows have a stride of 1 or 2 and a square kernel of 3, 5 or 7, padded by k // 2 on every side, or as
TensorFlow's SAME pads if `same`: ceil(size / stride) outputs, the odd pixel at the end.
"""

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("effnet_fast", "DEF")

_SCHEMAS = (
    "channel_stats(Tensor x) -> (Tensor mean, Tensor m2)",
    "dwconv_stats(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, int stride, bool same)"
    " -> (Tensor y, Tensor mean, Tensor m2)",
    "pool(Tensor y, Tensor scale, Tensor shift, bool silu) -> Tensor",
    "apply(Tensor y, Tensor scale, Tensor shift, bool silu, Tensor? gate, Tensor? residual) -> Tensor",
    "backward_sums(Tensor grad, Tensor y, Tensor scale, Tensor shift, Tensor mean, Tensor rstd, bool silu) -> Tensor",
    "backward_dwconv(Tensor grad, Tensor? y, Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? mean,"
    " Tensor? gate, Tensor? pooled_grad, Tensor? a, Tensor? b, Tensor? in_scale, Tensor? in_shift, Tensor? in_mean,"
    " Tensor? in_rstd, int stride, bool same) -> (Tensor g, Tensor dweight, Tensor sums)",
    "backward_apply(Tensor grad, Tensor y, Tensor scale, Tensor shift, Tensor mean, bool silu, Tensor? gate,"
    " Tensor? pooled_grad, Tensor a, Tensor b) -> Tensor",
    "dwconv_affine(Tensor x, Tensor weight, Tensor? in_scale, Tensor? in_shift, Tensor scale, Tensor shift, int stride,"
    " bool same) -> (Tensor z, Tensor pooled)",
)

_PRODUCT_SCHEMAS = (
    "patches(Tensor x, int kernel, int stride, bool same) -> Tensor",
    "pointwise_stats(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? gate)"
    " -> (Tensor y, Tensor mean, Tensor m2)",
    "pointwise_affine(Tensor x, Tensor weight, Tensor? gate, Tensor scale, Tensor shift, bool silu, Tensor? residual)"
    " -> Tensor",
    "backward_pointwise(Tensor grad, Tensor? y, Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? mean,"
    " bool silu, Tensor? gate, Tensor? a, Tensor? b, Tensor? in_scale, Tensor? in_shift, Tensor? in_mean,"
    " Tensor? in_rstd, Tensor? in_gate, Tensor? residual, bool input_grad) -> (Tensor dx, Tensor dweight, Tensor sums)",
)

_ALGEBRA_SCHEMAS = (
    "batch_norm_stats(Tensor mean, Tensor m2, Tensor weight, Tensor bias, float eps, int count) -> Tensor",
    "batch_norm_grad(Tensor stats, Tensor sums, Tensor? gate, Tensor? pooled_grad, int count) -> Tensor",
    "squeeze_gate(Tensor sums, int pixels, Tensor w_reduce, Tensor b_reduce, Tensor w_expand, Tensor b_expand,"
    " ScalarType dtype) -> Tensor",
    "squeeze_gate_grad(Tensor squeeze, Tensor dgate, int pixels, Tensor w_reduce, Tensor b_reduce, Tensor w_expand,"
    " Tensor b_expand, ScalarType dtype)"
    " -> (Tensor pooled_grad, Tensor dw_reduce, Tensor db_reduce, Tensor dw_expand, Tensor db_expand)",
)

_BLOCK_SCHEMAS = (
    "block_forward(Tensor x, Tensor? w_expand, Tensor? bn1_weight, Tensor? bn1_bias, float bn1_eps,"
    " Tensor w_depthwise, Tensor bn2_weight, Tensor bn2_bias, float bn2_eps, Tensor w_se_reduce, Tensor b_se_reduce,"
    " Tensor w_se_expand, Tensor b_se_expand, Tensor w_project, Tensor bn3_weight, Tensor bn3_bias, float bn3_eps,"
    " Tensor? branch_scale, int stride, bool same, bool residual, bool sweep)"
    " -> (Tensor out, Tensor e, Tensor y, Tensor p, Tensor stats1, Tensor stats2, Tensor stats3, Tensor squeeze,"
    " Tensor moments)",
    "block_backward(Tensor dout, Tensor x, Tensor e, Tensor y, Tensor p, Tensor stats1, Tensor stats2, Tensor stats3,"
    " Tensor squeeze, Tensor moments, Tensor? w_expand, Tensor w_depthwise, Tensor w_se_reduce, Tensor b_se_reduce,"
    " Tensor w_se_expand, Tensor b_se_expand, Tensor w_project, Tensor? branch_scale, int stride, bool same,"
    " bool residual, bool input_grad)"
    " -> (Tensor dx, Tensor dbn3, Tensor dbn2, Tensor dw_project, Tensor dw_depthwise, Tensor dw_se_reduce,"
    " Tensor db_se_reduce, Tensor dw_se_expand, Tensor db_se_expand, Tensor dw_expand, Tensor dbn1)",
    "block_inference(Tensor x, Tensor? expand, Tensor? expand_shift, Tensor w_depthwise, Tensor depthwise_shift,"
    " Tensor w_se_reduce, Tensor b_se_reduce, Tensor w_se_expand, Tensor b_se_expand, Tensor project,"
    " Tensor project_shift, int stride, bool same, bool residual) -> Tensor",
    "pack_pointwise(Tensor weight, Tensor like) -> Tensor",
    "packed_convolution(Tensor x, Tensor panels, int kernel, int stride, bool same, Tensor shift, bool silu) -> Tensor",
)

_SWEEP_SCHEMAS = (
    "expand_stats(Tensor x, Tensor weight) -> (Tensor mean, Tensor m2, Tensor moments)",
    "expand_dwconv_stats(Tensor x, Tensor w_expand, Tensor scale, Tensor shift, Tensor w_depthwise, int stride,"
    " bool same) -> (Tensor y, Tensor mean, Tensor m2)",
    "backward_expand_dwconv(Tensor grad, Tensor y, Tensor x, Tensor w_expand, Tensor w_depthwise, Tensor scale,"
    " Tensor shift, Tensor mean, Tensor? gate, Tensor? pooled_grad, Tensor a, Tensor b, Tensor in_scale,"
    " Tensor in_shift, Tensor in_mean, Tensor in_rstd, Tensor moments, Tensor? residual, int stride, bool same)"
    " -> (Tensor dx, Tensor dw_expand, Tensor dw_depthwise, Tensor affine)",
)

_UPDATE_SCHEMA = (
    "rmsprop_step(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] squares, Tensor(c!)[] velocities, float lr,"
    " float alpha, float momentum, float eps, float weight_decay) -> ()"
)

PASSES = tuple(schema.split("(")[0] for schema in _SCHEMAS)
PRODUCTS = tuple(schema.split("(")[0] for schema in _PRODUCT_SCHEMAS)
SWEEPS = tuple(schema.split("(")[0] for schema in _SWEEP_SCHEMAS)
ALGEBRA = tuple(schema.split("(")[0] for schema in _ALGEBRA_SCHEMAS)
BLOCKS = tuple(schema.split("(")[0] for schema in _BLOCK_SCHEMAS)

for _schemas in (_SCHEMAS, _PRODUCT_SCHEMAS, _SWEEP_SCHEMAS, _ALGEBRA_SCHEMAS, _BLOCK_SCHEMAS, (_UPDATE_SCHEMA,)):
    for _schema in _schemas:
        _LIBRARY.define(_schema)


def output_size(size: int, kernel: int, stride: int, same: bool) -> int:
    """Outputs of a convolution along one dimension."""
    return -(-size // stride) if same else (size + 2 * (kernel // 2) - kernel) // stride + 1


def empty_like_nhwc(x: Tensor) -> Tensor:
    """An uninitialised tensor of x's shape, dtype and device, in channels_last format."""
    return torch.empty_like(x, memory_format=torch.channels_last)


def convolution_output(x: Tensor, weight: Tensor, stride: int = 1, same: bool = False) -> Tensor:
    """An uninitialised output of a convolution of x, depthwise or not."""
    n, _, h, w = x.shape
    channels, _, kernel, _ = weight.shape
    h, w = (output_size(size, kernel, stride, same) for size in (h, w))
    return x.new_empty(n, h, w, channels).permute(0, 3, 1, 2)


def _floats(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)


@torch.library.register_fake("effnet_fast::channel_stats", lib=_LIBRARY)
def _(x):
    return _floats(x, x.shape[1]), _floats(x, x.shape[1])


@torch.library.register_fake("effnet_fast::dwconv_stats", lib=_LIBRARY)
def _(x, weight, scale, shift, stride, same):
    return convolution_output(x, weight, stride, same), _floats(x, x.shape[1]), _floats(x, x.shape[1])


@torch.library.register_fake("effnet_fast::pool", lib=_LIBRARY)
def _(y, scale, shift, silu):
    return _floats(y, *y.shape[:2])


@torch.library.register_fake("effnet_fast::apply", lib=_LIBRARY)
def _(y, scale, shift, silu, gate, residual):
    return empty_like_nhwc(y)


@torch.library.register_fake("effnet_fast::backward_sums", lib=_LIBRARY)
def _(grad, y, scale, shift, mean, rstd, silu):
    return _floats(y, 5 if silu else 2, *y.shape[:2])


@torch.library.register_fake("effnet_fast::backward_dwconv", lib=_LIBRARY)
def _(grad, y, x, weight, *operands):
    return empty_like_nhwc(x), _floats(x, *weight.shape), _floats(x, 2, x.shape[1])


@torch.library.register_fake("effnet_fast::backward_apply", lib=_LIBRARY)
def _(grad, y, scale, shift, mean, silu, gate, pooled_grad, a, b):
    return empty_like_nhwc(y)


@torch.library.register_fake("effnet_fast::dwconv_affine", lib=_LIBRARY)
def _(x, weight, in_scale, in_shift, scale, shift, stride, same):
    return convolution_output(x, weight, stride, same), _floats(x, *x.shape[:2])


@torch.library.register_fake("effnet_fast::patches", lib=_LIBRARY)
def _(x, kernel, stride, same):
    n, c, h, w = x.shape
    h, w = (output_size(size, kernel, stride, same) for size in (h, w))
    return x.new_empty(n, h, w, -(-(kernel * kernel * c) // 8) * 8).permute(0, 3, 1, 2)


@torch.library.register_fake("effnet_fast::pointwise_stats", lib=_LIBRARY)
def _(x, weight, scale, shift, gate):
    return convolution_output(x, weight), _floats(x, weight.shape[0]), _floats(x, weight.shape[0])


@torch.library.register_fake("effnet_fast::pointwise_affine", lib=_LIBRARY)
def _(x, weight, gate, scale, shift, silu, residual):
    return convolution_output(x, weight)


@torch.library.register_fake("effnet_fast::backward_pointwise", lib=_LIBRARY)
def _(
    grad, y, x, weight, scale, shift, mean, silu, gate, a, b, in_scale, in_shift, in_mean, in_rstd, in_gate, residual,
    input_grad,
):  # fmt: skip
    sums = _floats(x, 0, x.shape[0], 0) if in_scale is None else _floats(x, 5, *x.shape[:2])
    return empty_like_nhwc(x if input_grad else x[:0]), _floats(x, *weight.shape), sums


@torch.library.register_fake("effnet_fast::expand_stats", lib=_LIBRARY)
def _(x, weight):
    channels, depth = weight.shape[:2]
    return _floats(x, channels), _floats(x, channels), _floats(x, 1 + depth, depth)


@torch.library.register_fake("effnet_fast::expand_dwconv_stats", lib=_LIBRARY)
def _(x, w_expand, scale, shift, w_depthwise, stride, same):
    y = convolution_output(convolution_output(x, w_expand), w_depthwise, stride, same)
    return y, _floats(x, len(w_expand)), _floats(x, len(w_expand))


@torch.library.register_fake("effnet_fast::backward_expand_dwconv", lib=_LIBRARY)
def _(grad, y, x, w_expand, w_depthwise, *operands):
    weights = (_floats(x, *w.shape) for w in (w_expand, w_depthwise))
    return empty_like_nhwc(x), *weights, _floats(x, 2, len(w_expand))


@torch.library.register_fake("effnet_fast::batch_norm_stats", lib=_LIBRARY)
def _(mean, m2, weight, bias, eps, count):
    return _floats(mean, 5, len(mean))


@torch.library.register_fake("effnet_fast::batch_norm_grad", lib=_LIBRARY)
def _(stats, sums, gate, pooled_grad, count):
    return _floats(stats, 4, stats.shape[1])


@torch.library.register_fake("effnet_fast::squeeze_gate", lib=_LIBRARY)
def _(sums, pixels, *mlp):
    return _floats(sums, 2, *sums.shape)


@torch.library.register_fake("effnet_fast::squeeze_gate_grad", lib=_LIBRARY)
def _(squeeze, dgate, pixels, w_reduce, b_reduce, w_expand, b_expand, dtype):
    weights = (w_reduce, b_reduce, w_expand, b_expand)
    return _floats(squeeze, *squeeze.shape[1:]), *(_floats(w, *w.shape) for w in weights)


@torch.library.register_fake("effnet_fast::rmsprop_step", lib=_LIBRARY)
def _(weights, grads, squares, velocities, lr, alpha, momentum, eps, weight_decay):
    pass
