"""Compound scaling: one baseline, three multipliers (Tan & Le 2019, section 3), and the named variants.

Two families share the rules for channels and repeats:

* ``reference``: the student study of compound scaling on CIFAR-10 (alpha, beta, gamma = 1.2, 1.1, 1.15).
* ``paper``: the published EfficientNet-B0 to B7, as torchvision and timm build them.
"""

import math
from dataclasses import dataclass
from typing import Literal

BASE_RESOLUTION = 224

# Grid-searched on B0 under depth * width^2 * resolution^2 ~ 2 (paper, section 3.3).
ALPHA, BETA, GAMMA = 1.2, 1.1, 1.15


@dataclass(frozen=True)
class Scaling:
    """Multipliers of the baseline's depth (repeats), width (channels) and resolution (input size).

    Raises ValueError unless all three are finite and positive.
    """

    depth: float = 1.0
    width: float = 1.0
    resolution: float = 1.0

    def __post_init__(self) -> None:
        for name in ("depth", "width", "resolution"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: got {value}, must be finite and positive")

    @classmethod
    def compound(cls, phi: float) -> "Scaling":
        """Scale all three axes by the coefficient phi: alpha**phi, beta**phi, gamma**phi (paper, equation 3)."""
        return cls(ALPHA**phi, BETA**phi, GAMMA**phi)

    def channels(self, baseline: int) -> int:
        """Scale a channel count: rounded to a multiple of 8, at least 8 and never below 90 % of the product."""
        exact = baseline * self.width
        rounded = max(8, int(exact + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * exact else rounded

    def repeats(self, baseline: int) -> int:
        """Scale a stage's number of blocks, rounded up."""
        return math.ceil(baseline * self.depth)


@dataclass(frozen=True)
class Variant:
    """A named scaling with the regularisation that goes with it."""

    scaling: Scaling
    drop_rate: float
    drop_path_rate: float
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1


@dataclass(frozen=True)
class Family:
    """What the variants of one source have in common.

    se_from: the width that the squeeze-excite ratio of 0.25 refers to.
    size_multiple: scaled input sizes are rounded to a multiple of it.
    init: ``"torch"`` keeps torch's defaults, ``"fan_out"`` is the initialisation of torchvision's EfficientNet.
    """

    se_from: Literal["expanded", "input"]
    size_multiple: int
    init: Literal["torch", "fan_out"]
    variants: dict[str, Variant]

    def input_size(self, scaling: Scaling, base: int = BASE_RESOLUTION) -> int:
        """Input height and width in pixels of a scaling, for a baseline that takes `base` pixels."""
        return max(1, round(base * scaling.resolution / self.size_multiple)) * self.size_multiple


def _reference() -> dict[str, Variant]:
    rates = (0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5)
    compound = {f"b{phi}": Variant(Scaling.compound(phi), rate, rate) for phi, rate in enumerate(rates)}
    return {
        "baseline": compound["b0"],
        "depth": Variant(Scaling(depth=4), 0.2, 0.2),
        "width": Variant(Scaling(width=2), 0.2, 0.2),
        "resolution": Variant(Scaling(resolution=2), 0.2, 0.2),
        "compound": compound["b2"],
        **compound,
    }


def _paper() -> dict[str, Variant]:
    # width, depth, input size, dropout: the coefficients published with the paper's models
    published = (
        (1.0, 1.0, 224, 0.2),
        (1.0, 1.1, 240, 0.2),
        (1.1, 1.2, 260, 0.3),
        (1.2, 1.4, 300, 0.3),
        (1.4, 1.8, 380, 0.4),
        (1.6, 2.2, 456, 0.4),
        (1.8, 2.6, 528, 0.5),
        (2.0, 3.1, 600, 0.5),
    )
    compound = {}
    for i, (width, depth, size, drop) in enumerate(published):
        # torchvision builds B5 to B7 with TensorFlow's BatchNorm constants, B0 to B4 with torch's
        eps, momentum = (1e-3, 0.01) if i >= 5 else (1e-5, 0.1)
        compound[f"b{i}"] = Variant(Scaling(depth, width, size / BASE_RESOLUTION), drop, 0.2, eps, momentum)
    return {
        "baseline": compound["b0"],
        "depth": Variant(Scaling(depth=4), 0.2, 0.2),
        "width": Variant(Scaling(width=2), 0.2, 0.2),
        "resolution": Variant(Scaling(resolution=2), 0.2, 0.2),
        "compound": Variant(Scaling(1.4, 1.2, 1.3), 0.3, 0.2),
        **compound,
    }


FAMILIES = {
    "reference": Family("expanded", 8, "torch", _reference()),
    "paper": Family("input", 1, "fan_out", _paper()),
}

VARIANTS = tuple(FAMILIES["reference"].variants)


def get_family(name: str) -> Family:
    """Look a family up by name. Raises ValueError that lists the choices."""
    if name not in FAMILIES:
        raise ValueError(f"family: got {name!r}, choose from {', '.join(FAMILIES)}")
    return FAMILIES[name]


def get_variant(variant: str | Scaling, family: str) -> Variant:
    """Look a variant up by name, or wrap a free Scaling with the baseline's regularisation.

    Raises ValueError that lists the choices.
    """
    variants = get_family(family).variants
    if isinstance(variant, Scaling):
        base = variants["baseline"]
        return Variant(variant, base.drop_rate, base.drop_path_rate)
    if variant not in variants:
        raise ValueError(f"variant: got {variant!r}, choose from {', '.join(variants)}")
    return variants[variant]
