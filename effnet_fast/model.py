"""EfficientNet: a seven-row stage table, scaled."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from effnet_fast.checkpointing import checkpointed
from effnet_fast.layers import ConvBN, MBConv, MBConvStage, PadType, StemBlock
from effnet_fast.memory import parse_memory
from effnet_fast.ops.memory_policy import Memory, check_memory
from effnet_fast.planning import Planner
from effnet_fast.pretrained import read_pretrained, write_pretrained
from effnet_fast.run_folder import CHECKPOINTS, RunFolder, read_checkpoint
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

# Of the stem, and of each stage's first block.
STRIDES = (2, *(stage.stride for stage in STAGES))

SE_RATIO = 0.25


class FeatureInfo(NamedTuple):
    """A map of `EfficientNet.feature_maps`: its channels, and the pixels of the image from one of its pixels on."""

    channels: int
    stride: int


class EfficientNet(nn.Module):
    """EfficientNet (Tan & Le 2019) at any scaling. Images [N, in_chans, H, W] to logits [N, num_classes].

    se_from: squeeze-excite is a quarter as wide as the block's "expanded" channels or its "input".
    drop_rate: dropout before the classifier. drop_path_rate: grows linearly from 0 over the blocks.
    strides: eight, of the stem and of each stage's first block, 1 or 2; fewer twos keep small images' maps large.
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
        strides: Sequence[int] = STRIDES,
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.2,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        pad_type: PadType = "symmetric",
        init: Literal["torch", "fan_out"] = "torch",
        memory: Memory = "fast",
    ) -> None:
        super().__init__()
        # What `save_pretrained` writes; memory decides nothing that is seen from outside.
        self._config: dict[str, Any] = {
            "scaling": asdict(scaling),
            "num_classes": num_classes,
            "se_from": se_from,
            "in_chans": in_chans,
            "strides": list(strides),
            "drop_rate": drop_rate,
            "drop_path_rate": drop_path_rate,
            "bn_eps": bn_eps,
            "bn_momentum": bn_momentum,
            "pad_type": pad_type,
        }
        _check(num_classes, in_chans, strides, drop_rate, drop_path_rate, bn_eps, bn_momentum, pad_type, init)
        check_memory(memory)
        channels = scaling.channels(STEM_CHANNELS)
        norm: dict[str, Any] = {"bn_eps": bn_eps, "bn_momentum": bn_momentum}
        self.stem = ConvBN(in_chans, channels, 3, strides[0], pad_type=pad_type, memory=memory, **norm)
        total = sum(scaling.repeats(stage.repeats) for stage in STAGES)
        built = 0
        self.stages = nn.ModuleList()
        for stage, stride in zip(STAGES, strides[1:], strict=True):
            blocks = []
            for i in range(scaling.repeats(stage.repeats)):
                out = scaling.channels(stage.channels)
                se_base = channels * stage.expand_ratio if se_from == "expanded" else channels
                blocks.append(
                    MBConv(
                        channels,
                        out,
                        stage.kernel,
                        stride if i == 0 else 1,
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
            self.stages.append(MBConvStage(*blocks))
        self.num_features = scaling.channels(HEAD_CHANNELS)
        self.head = ConvBN(channels, self.num_features, 1, memory=memory, **norm)
        self.dropout = nn.Dropout(drop_rate)
        self.classifier = nn.Linear(self.num_features, num_classes)
        self._segments: tuple[tuple[int, int], ...] = ()
        if init == "fan_out":
            self.apply(_init_fan_out)

    @property
    def blocks(self) -> list[MBConv]:
        """Of all stages, in their order."""
        return [block for block in self.modules() if isinstance(block, MBConv)]

    def set_memory(self, policies: Sequence[Memory], segments: Sequence[tuple[int, int]] = ()) -> None:
        """What is kept for backward, part by part: `planning.Plan` holds such an assignment. Gradients are the same.

        policies: of the stem with the first block, each other block, and the head.
        segments: [begin, end) of the blocks, which keep only the first one's input (with block 0, the stem's) and run
            again in the backward pass, where they keep what their policies say; in ascending order.
        Raises ValueError for another number of policies, an unknown one, or segments that overlap or reach too far.
        """
        parts: list[ConvBN | MBConv] = [*self.blocks, self.head]
        if len(policies) != len(parts):
            raise ValueError(f"policies: got {len(policies)}, must be {len(parts)}: of each block and the head")
        bounds = [0, *(bound for segment in segments for bound in segment), len(parts) - 1]
        if any(a > b for a, b in pairwise(bounds)) or any(begin == end for begin, end in segments):
            raise ValueError(
                f"segments: got {list(segments)}, must be [begin, end) in ascending order, of the {bounds[-1]} blocks"
            )
        for policy in policies:
            check_memory(policy)
        for part, policy in zip(parts, policies, strict=True):
            part.memory = policy
        self.stem.memory = policies[0]
        self._segments = tuple(segments)

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

    def save_pretrained(self, path: str | Path) -> Path:
        """Write the model to one safetensors file, replaced atomically: weights, and how it is built in the header.

        path: a file named ``*.safetensors``, or a folder for ``model.safetensors``, which is made if need be.
        Returns the file's path. Raises RuntimeError if the model is fused, OSError if the file can't be written.
        """
        if self.stem.bn is None:
            raise RuntimeError("save_pretrained: the model is fused, save it before")
        return write_pretrained(Path(path), self.state_dict(), self._config)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, memory: Memory = "fast") -> "EfficientNet":
        """The model, in eval mode, that `save_pretrained` wrote, or that a run of `effnet_fast.train` ended with.

        path: a file or folder of `save_pretrained`; or a run's folder (its best checkpoint) or checkpoint, of which the
        moving average is taken. Nothing in a file is executed.
        Raises ValueError whose line names the file.
        """
        path = Path(path)
        check_memory(memory)
        if RunFolder(path).has_run():
            path /= CHECKPOINTS["best"]
        if path.suffix == ".pt":
            checkpoint = read_checkpoint(path)
            state, config = checkpoint["ema"], checkpoint.get("config")
        else:
            state, config = read_pretrained(path)
        try:
            # Without memory of its own, so that a foreign configuration can't ask for more than the file holds.
            with torch.device("meta"):
                if path.suffix == ".pt":
                    classes = len(state["classifier.bias"])
                    model = create_model(
                        config["variant"],
                        classes,
                        family=config["family"],
                        strides=config["strides"],
                        memory=memory,
                    )
                else:
                    scaling = Scaling(**config["scaling"])
                    if scaling.depth > len(state):  # blocks cost time nevertheless
                        raise ValueError("fewer tensors than blocks")
                    model = cls(**config | {"scaling": scaling, "memory": memory})
            model.load_state_dict(state, assign=True)
        # Foreign configurations raise whatever the model's parts make of their values.
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            raise ValueError(f"{path}: its weights do not fit its configuration") from None
        return model.eval()

    @property
    def feature_info(self) -> list[FeatureInfo]:
        """Of the maps that `feature_maps` returns, in its order."""
        scaling, strides = Scaling(**self._config["scaling"]), self._config["strides"]
        return [FeatureInfo(scaling.channels(STAGES[i].channels), math.prod(strides[: i + 2])) for i in self._pyramid()]

    def _pyramid(self) -> list[int]:
        """The last stage before each halving of the map, and the last of all."""
        following = self._config["strides"][2:]
        return [*(i for i, stride in enumerate(following) if stride == 2), len(STAGES) - 1]

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The last map of each size, for a network that takes this one as its backbone: as timm's features_only.

        Maps [N, channels, ~H / stride, ~W / stride] of `feature_info`: five, strides 2 to 32, unless the model has
        `strides` of its own. The head takes no part.
        """
        maps = []
        pyramid = self._pyramid()
        for i, stage in enumerate(self.stages):
            x = stage(x, None if i else self.stem)
            if i in pyramid:
                maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """The head's feature map before pooling: [N, num_features, ~H / 32, ~W / 32], or as `strides` say."""
        if not self._segments or not torch.is_grad_enabled():
            for i, stage in enumerate(self.stages):
                x = stage(x, None if i else self.stem)
            return self.head(x)
        first, *blocks = self.blocks
        parts = [StemBlock(self.stem, first), *blocks]
        done = 0
        for begin, end in self._segments:
            for part in parts[done:begin]:
                x = part(x)
            x = checkpointed(parts[begin:end], x)
            done = end
        for part in parts[done:]:
            x = part(x)
        return self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.forward_features(x).mean((2, 3))))


def create_model(
    variant: str | Scaling,
    num_classes: int = 10,
    *,
    family: str = "reference",
    in_chans: int = 3,
    strides: Sequence[int] = STRIDES,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    bn_eps: float | None = None,
    bn_momentum: float | None = None,
    pad_type: PadType = "symmetric",
    init: Literal["torch", "fan_out"] | None = None,
    memory: Memory | str | int = "fast",
    batch_size: int | None = None,
    input_size: int | None = None,
    amp: str = "bf16",
) -> EfficientNet:
    """Build a variant by name, or any `Scaling`; what is None takes the variant's own value.

    variant: a name in `VARIANTS`, ``Scaling(depth, width, resolution)`` or ``Scaling.compound(phi)``.
    family: "reference" (the CIFAR-10 study) or "paper" (as torchvision and timm build it).
    memory: a policy of `EfficientNet`; or a budget, in bytes or as "8GB", for a training step of batch_size images of
        input_size pixels under autocast amp ("off", "bf16", "fp16") with the study's optimizer and moving average. Each
        part then keeps what makes the step fastest within it; on the GPU if there is one, else on the CPU.
    Raises ValueError that names the argument and what is allowed, and DoesNotFit, one too, if the budget is too small.
    """
    parsed = parse_memory(memory)
    preset = get_variant(variant, family)
    fam = get_family(family)
    model = EfficientNet(
        preset.scaling,
        num_classes,
        se_from=fam.se_from,
        in_chans=in_chans,
        strides=strides,
        drop_rate=preset.drop_rate if drop_rate is None else drop_rate,
        drop_path_rate=preset.drop_path_rate if drop_path_rate is None else drop_path_rate,
        bn_eps=preset.bn_eps if bn_eps is None else bn_eps,
        bn_momentum=preset.bn_momentum if bn_momentum is None else bn_momentum,
        pad_type=pad_type,
        init=fam.init if init is None else init,
        memory="fast" if isinstance(parsed, int) else parsed,
    )
    if isinstance(parsed, int):
        if batch_size is None:
            raise ValueError("batch_size: must be given, as memory is a budget for its training step")
        size = fam.input_size(preset.scaling) if input_size is None else input_size
        device = "cuda" if torch.cuda.is_available() else "cpu"
        plan = Planner(model, size, amp=amp, device=device).fastest(batch_size, parsed)
        model.set_memory(plan.policies, plan.segments)
    return model


def check_strides(strides: Sequence[int]) -> None:
    """Raises ValueError for strides that no model can have."""
    if len(strides) != len(STRIDES) or not set(strides) <= {1, 2}:
        given = ",".join(map(str, strides))
        raise ValueError(f"strides: got {given}, must be eight of 1 or 2, of the stem and the seven stages")


def _check(
    num_classes: int,
    in_chans: int,
    strides: Sequence[int],
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
    check_strides(strides)
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
