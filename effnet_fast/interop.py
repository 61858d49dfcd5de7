"""Weights from and to torchvision's and timm's EfficientNets.

The functions rename a state dict's keys and pass the tensors through, so a round trip gives back the same
dict. The names follow from the keys alone: any depth, width or number of classes. Models with equal logits:

* ``torchvision.models.efficientnet_b3()`` and ``create_model("b3", 1000, family="paper")``
* ``timm.create_model("efficientnet_b3")`` and the same with ``bn_eps=1e-5``
* ``timm.create_model("tf_efficientnet_b3")`` and the same with ``bn_eps=1e-3, pad_type="same"``
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

# (stage, block in stage) to whether the block has an expand convolution
Blocks = dict[tuple[int, int], bool]


def from_torchvision(state_dict: Mapping[str, Tensor], *, strict: bool = True) -> dict[str, Tensor]:
    """Rename the state dict of a ``torchvision.models.efficientnet_b*`` for `EfficientNet.load_state_dict`.

    strict: a key that has no counterpart raises ValueError; otherwise it is left out.
    """
    return _rename(state_dict, _torchvision_names(_torchvision_blocks(state_dict)), "torchvision", strict)


def to_torchvision(state_dict: Mapping[str, Tensor], *, strict: bool = True) -> dict[str, Tensor]:
    """Rename an `EfficientNet`'s state dict for a ``torchvision.models.efficientnet_b*``.

    strict: a key that has no counterpart raises ValueError; otherwise it is left out.
    """
    return _rename(state_dict, _inverse(_torchvision_names(_blocks(state_dict))), "effnet_fast", strict)


def from_timm(state_dict: Mapping[str, Tensor], *, strict: bool = True) -> dict[str, Tensor]:
    """Rename the state dict of a timm ``efficientnet_b*`` or ``tf_efficientnet_b*`` for `EfficientNet`.

    strict: a key that has no counterpart raises ValueError; otherwise it is left out.
    """
    return _rename(state_dict, _timm_names(_timm_blocks(state_dict)), "timm", strict)


def to_timm(state_dict: Mapping[str, Tensor], *, strict: bool = True) -> dict[str, Tensor]:
    """Rename an `EfficientNet`'s state dict for a timm ``efficientnet_b*`` or ``tf_efficientnet_b*``.

    strict: a key that has no counterpart raises ValueError; otherwise it is left out.
    """
    return _rename(state_dict, _inverse(_timm_names(_blocks(state_dict))), "effnet_fast", strict)


def _rename(state_dict: Mapping[str, Tensor], names: dict[str, str], source: str, strict: bool) -> dict[str, Tensor]:
    renamed, unknown = {}, []
    for key, tensor in state_dict.items():
        module, _, leaf = key.rpartition(".")
        if module in names:
            renamed[f"{names[module]}.{leaf}"] = tensor
        else:
            unknown.append(key)
    if unknown and strict:
        shown = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise ValueError(
            f"state_dict: {len(unknown)} of {len(state_dict)} keys are no {source} EfficientNet's: {shown}"
        )
    return renamed


def _inverse(names: dict[str, str]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in names.items()}


def _blocks(keys: Mapping[str, Tensor]) -> Blocks:
    found = _matches(r"stages\.(\d+)\.(\d+)\.depthwise\.conv\.weight", keys)
    return {(int(m[1]), int(m[2])): f"stages.{m[1]}.{m[2]}.expand.conv.weight" in keys for m in found}


def _torchvision_blocks(keys: Mapping[str, Tensor]) -> Blocks:
    # A block's layers are numbered: squeeze-excite is second, or third after an expand convolution.
    found = _matches(r"features\.(\d+)\.(\d+)\.block\.([12])\.fc1\.weight", keys)
    return {(int(m[1]) - 1, int(m[2])): m[3] == "2" for m in found}


def _timm_blocks(keys: Mapping[str, Tensor]) -> Blocks:
    found = _matches(r"blocks\.(\d+)\.(\d+)\.conv_dw\.weight", keys)
    return {(int(m[1]), int(m[2])): f"blocks.{m[1]}.{m[2]}.conv_pwl.weight" in keys for m in found}


def _matches(pattern: str, keys: Iterable[str]) -> list[re.Match[str]]:
    return [match for match in map(re.compile(pattern).fullmatch, keys) if match]


def _torchvision_names(blocks: Blocks) -> dict[str, str]:
    """torchvision's module names to ours."""
    head = max((stage for stage, _ in blocks), default=0) + 2
    names = {
        "features.0.0": "stem.conv",
        "features.0.1": "stem.bn",
        f"features.{head}.0": "head.conv",
        f"features.{head}.1": "head.bn",
        "classifier.1": "classifier",
    }
    for (stage, block), expands in blocks.items():
        parts = ("expand", "depthwise", "se", "project") if expands else ("depthwise", "se", "project")
        for i, part in enumerate(parts):
            layers = {"fc1": "reduce", "fc2": "expand"} if part == "se" else {"0": "conv", "1": "bn"}
            for theirs, ours in layers.items():
                names[f"features.{stage + 1}.{block}.block.{i}.{theirs}"] = f"stages.{stage}.{block}.{part}.{ours}"
    return names


_TIMM_SE = {"se.conv_reduce": "se.reduce", "se.conv_expand": "se.expand"}

_TIMM_DEPTHWISE_SEPARABLE = {
    "conv_dw": "depthwise.conv",
    "bn1": "depthwise.bn",
    "conv_pw": "project.conv",
    "bn2": "project.bn",
    **_TIMM_SE,
}

_TIMM_INVERTED_RESIDUAL = {
    "conv_pw": "expand.conv",
    "bn1": "expand.bn",
    "conv_dw": "depthwise.conv",
    "bn2": "depthwise.bn",
    "conv_pwl": "project.conv",
    "bn3": "project.bn",
    **_TIMM_SE,
}


def _timm_names(blocks: Blocks) -> dict[str, str]:
    """timm's module names to ours."""
    names = {
        "conv_stem": "stem.conv",
        "bn1": "stem.bn",
        "conv_head": "head.conv",
        "bn2": "head.bn",
        "classifier": "classifier",
    }
    for (stage, block), expands in blocks.items():
        for theirs, ours in (_TIMM_INVERTED_RESIDUAL if expands else _TIMM_DEPTHWISE_SEPARABLE).items():
            names[f"blocks.{stage}.{block}.{theirs}"] = f"stages.{stage}.{block}.{ours}"
    return names
