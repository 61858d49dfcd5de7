"""Fused operations with autograd, each beside its plain PyTorch twin of the same signature (`<op>_eager`)."""

from effnet_fast.ops.bn_act import bn_act, bn_act_eager
from effnet_fast.ops.conv_bn_act import conv_bn_act, conv_bn_act_eager
from effnet_fast.ops.inference import Convolution, conv_folded, conv_folded_eager, mbconv_folded, mbconv_folded_eager
from effnet_fast.ops.mbconv import mbconv, mbconv_eager
from effnet_fast.ops.mbconv_section import (
    dwconv_bn_silu,
    dwconv_bn_silu_eager,
    mbconv_section,
    mbconv_section_eager,
)
from effnet_fast.ops.memory_policy import Memory
from effnet_fast.ops.normalization import BatchNorm
from effnet_fast.ops.squeeze_excite import SqueezeExcite, squeeze_excite, squeeze_excite_eager

__all__ = [
    "BatchNorm",
    "Convolution",
    "Memory",
    "SqueezeExcite",
    "bn_act",
    "bn_act_eager",
    "conv_bn_act",
    "conv_bn_act_eager",
    "conv_folded",
    "conv_folded_eager",
    "dwconv_bn_silu",
    "dwconv_bn_silu_eager",
    "mbconv",
    "mbconv_eager",
    "mbconv_folded",
    "mbconv_folded_eager",
    "mbconv_section",
    "mbconv_section_eager",
    "squeeze_excite",
    "squeeze_excite_eager",
]
