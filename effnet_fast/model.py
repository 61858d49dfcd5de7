"""EfficientNet: a seven-row stage table, scaled."""

from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from effnet_fast.layers import ConvBN, MBConv, PadType
from effnet_fast.ops.memory_policy import Memory, check_memory
from effnet_fast.scaling import Scaling, get_family, get_variant


class Stage(NamedTuple):
    repeats: int
    kernel: int
    stride: int
    expand_ratio: int
    channels: int


STEM_CHANNELS, HEAD_CHANNELS = 32, 1280

# EfficientNet-B0 (paper, table 1)
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)

SE_RATIO = 0.25


class EfficientNet(nn.Module):
    """EfficientNet (Tan & Le 2019) at any scaling. Images [N, in_chans, H, W] to logits [N, num_classes].

    se_from: squeeze-excite is a quarter as wide as the block's "expanded" channels or its "input".
    drop_rate: dropout before the classifier. drop_path_rate: grows linearly from 0 over the blocks.
    pad_type: "symmetric" (torch) or "same" (TensorFlow, timm's ``tf_`` models).
    init: "torch" or "fan_out", see `scaling.Family`.
    memory: what the compiled passes keep for backward: "fast", "lean" (not the expanded tensors, they are computed
    again) or "min" (only each block's input). The gradients are the same.
    """

    def __init__(
        self,
        scaling: Scaling,
        num_classes: int = 10,
        *,
        se_from: Literal["expanded", "input"] = "expanded",
        in_chans: int = 3,
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.2,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        pad_type: PadType = "symmetric",
        init: Literal["torch", "fan_out"] = "torch",
        memory: Memory = "fast",
    ) -> None:
        super().__init__()
        _check(num_classes, in_chans, drop_rate, drop_path_rate, bn_eps, bn_momentum, pad_type, init)
        check_memory(memory)
        channels = scaling.channels(STEM_CHANNELS)
        norm: dict[str, Any] = {"bn_eps": bn_eps, "bn_momentum": bn_momentum}
        self.stem = ConvBN(in_chans, channels, 3, 2, pad_type=pad_type, memory=memory, **norm)
        total = sum(scaling.repeats(stage.repeats) for stage in STAGES)
        built = 0
        self.stages = nn.ModuleList()
        for stage in STAGES:
            blocks = []
            for i in range(scaling.repeats(stage.repeats)):
                out = scaling.channels(stage.channels)
                se_base = channels * stage.expand_ratio if se_from == "expanded" else channels
                blocks.append(
                    MBConv(
                        channels,
                        out,
                        stage.kernel,
                        stage.stride if i == 0 else 1,
                        stage.expand_ratio,
                        max(1, int(SE_RATIO * se_base)),
                        drop_path_rate=drop_path_rate * built / total,
                        pad_type=pad_type,
                        memory=memory,
                        **norm,
                    )
                )
                channels = out
                built += 1
            self.stages.append(nn.Sequential(*blocks))
        self.num_features = scaling.channels(HEAD_CHANNELS)
        self.head = ConvBN(channels, self.num_features, 1, memory=memory, **norm)
        self.dropout = nn.Dropout(drop_rate)
        self.classifier = nn.Linear(self.num_features, num_classes)
        if init == "fan_out":
            self.apply(_init_fan_out)

    def fuse(self) -> "EfficientNet":
        """Fold every BatchNorm into the convolution before it, for inference, in place; returns the model.

        The state dict then has ``*.conv.bias`` instead of ``*.bn.*``; squeeze-excite and classifier keep their keys. A
        fused model loads only a fused one's. All parameters are frozen; gradients of the images still exist, and
        `train()` raises RuntimeError.
        Raises RuntimeError if any part of the model is in training mode. A fused model stays as it is.
        """
        if any(module.training for module in self.modules()):
            raise RuntimeError("fuse: the model is in training mode, call eval() first")
        for module in list(self.modules()):
            if isinstance(module, ConvBN):
                module.fuse()
        return self.requires_grad_(False)

    def train(self, mode: bool = True) -> "EfficientNet":
        """As of any module. Raises RuntimeError for mode=True if the model is fused."""
        if mode and self.stem.bn is None:
            raise RuntimeError("train: the model is fused, its BatchNorms are gone; build it anew to train it")
        return super().train(mode)

    def forward_features(self, x: Tensor) -> Tensor:
        """The head's feature map before pooling: [N, num_features, ~H / 32, ~W / 32]."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.forward_features(x).mean((2, 3))))


def create_model(
    variant: str | Scaling,
    num_classes: int = 10,
    *,
    family: str = "reference",
    in_chans: int = 3,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    bn_eps: float | None = None,
    bn_momentum: float | None = None,
    pad_type: PadType = "symmetric",
    init: Literal["torch", "fan_out"] | None = None,
    memory: Memory = "fast",
) -> EfficientNet:
    """Build a variant by name, or any `Scaling`; what is None takes the variant's own value.

    variant: a name in `VARIANTS`, ``Scaling(depth, width, resolution)`` or ``Scaling.compound(phi)``.
    family: "reference" (the CIFAR-10 study) or "paper" (as torchvision and timm build it).
    Raises ValueError that names the argument and what is allowed.
    """
    preset = get_variant(variant, family)
    fam = get_family(family)
    return EfficientNet(
        preset.scaling,
        num_classes,
        se_from=fam.se_from,
        in_chans=in_chans,
        drop_rate=preset.drop_rate if drop_rate is None else drop_rate,
        drop_path_rate=preset.drop_path_rate if drop_path_rate is None else drop_path_rate,
        bn_eps=preset.bn_eps if bn_eps is None else bn_eps,
        bn_momentum=preset.bn_momentum if bn_momentum is None else bn_momentum,
        pad_type=pad_type,
        init=fam.init if init is None else init,
        memory=memory,
    )


def _check(
    num_classes: int,
    in_chans: int,
    drop_rate: float,
    drop_path_rate: float,
    bn_eps: float,
    bn_momentum: float,
    pad_type: str,
    init: str,
) -> None:
    for name, count in (("num_classes", num_classes), ("in_chans", in_chans)):
        if count < 1:
            raise ValueError(f"{name}: got {count}, must be at least 1")
    for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
        if not 0 <= rate < 1:
            raise ValueError(f"{name}: got {rate}, must be in [0, 1)")
    if not bn_eps > 0:
        raise ValueError(f"bn_eps: got {bn_eps}, must be positive")
    if not 0 < bn_momentum <= 1:
        raise ValueError(f"bn_momentum: got {bn_momentum}, must be in (0, 1]")
    if pad_type not in ("symmetric", "same"):
        raise ValueError(f"pad_type: got {pad_type!r}, choose from symmetric, same")
    if init not in ("torch", "fan_out"):
        raise ValueError(f"init: got {init!r}, choose from torch, fan_out")


def _init_fan_out(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        bound = module.out_features**-0.5
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.zeros_(module.bias)
