"""What the variants cost: parameters, multiply-adds and activations, beside the published figures.

    python -m effnet_fast.summary --family paper --variant b0 b3

Convolutions and linear layers are counted, for one image, as fvcore counts them: a multiply-add is one MAC
and two FLOPs, an activation is an element of their outputs. Shapes suffice for that: nothing is computed.
"""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from effnet_fast.cli import ArgumentParser, at_least, integers
from effnet_fast.model import STAGES, STRIDES, EfficientNet, create_model
from effnet_fast.passes.backend import use_backend
from effnet_fast.scaling import BASE_RESOLUTION, FAMILIES, VARIANTS, Scaling, get_family, get_variant

NUM_CLASSES = {"reference": 10, "paper": 1000}

# The study's claimed FLOPs, and the paper's multiply-adds (table 2, figure 8), in billions
PUBLISHED = {
    "reference": {"baseline": 0.82, "depth": 3.35, "width": 3.02, "resolution": 3.27, "compound": 1.82},
    "paper": {
        "baseline": 0.39,
        "depth": 1.8,
        "width": 1.8,
        "resolution": 1.9,
        "compound": 1.8,
        "b0": 0.39,
        "b1": 0.70,
        "b2": 1.0,
        "b3": 1.8,
        "b4": 4.2,
        "b5": 9.9,
        "b6": 19.0,
        "b7": 37.0,
    },
}

PUBLISHED_HEAD = {"reference": "claimed (B)", "paper": "paper (B)"}

FOOTNOTE = {
    "reference": "claimed: the study's FLOPs, in mixed units: compound's is MACs, the others about 2 x MACs",
    "paper": "paper: multiply-adds on ImageNet, from table 2 (b0 to b7) and figure 8 (the others)",
}


@dataclass(frozen=True)
class Counts:
    """Size and cost of one variant. macs and activations are per image of input_size x input_size pixels."""

    family: str
    variant: str
    num_classes: int
    scaling: Scaling
    input_size: int
    blocks: int
    params: int
    macs: int
    activations: int

    @property
    def flops(self) -> int:
        return 2 * self.macs


def count(
    variant: str,
    family: str,
    num_classes: int,
    resolution: int = BASE_RESOLUTION,
    strides: Sequence[int] = STRIDES,
) -> Counts:
    """Count a variant by name.

    resolution: the baseline's input size in pixels, which the variant's resolution multiplier scales.
    strides: eight, of the stem and the stages.
    Raises ValueError that names the argument and what is allowed.
    """
    if resolution < 1:
        raise ValueError(f"resolution: got {resolution}, must be at least 1")
    scaling = get_variant(variant, family).scaling
    size = get_family(family).input_size(scaling, resolution)
    with torch.device("meta"):
        model = create_model(variant, num_classes, family=family, strides=strides)
    macs, activations = count_operations(model, size)
    return Counts(
        family,
        variant,
        num_classes,
        scaling,
        size,
        blocks=sum(scaling.repeats(stage.repeats) for stage in STAGES),
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=macs,
        activations=activations,
    )


def count_operations(model: EfficientNet, size: int) -> tuple[int, int]:
    """Multiply-adds and activations of the model for one image of size x size pixels. Leaves the model as it is."""
    model = copy.deepcopy(model).to("meta").eval()
    image = torch.empty(1, model.stem.conv.weight.shape[1], size, size, device="meta")
    aten = torch.ops.aten
    outputs = FlopCounterMode(
        display=False, custom_mapping={aten.convolution: _output_elements, aten.addmm: _output_elements}
    )
    # Plain PyTorch runs on the meta device, and shows each convolution to the counters; a fused op would not.
    with use_backend("eager"), torch.no_grad(), FlopCounterMode(display=False) as flops, outputs:
        model(image)
    return flops.get_total_flops() // 2, outputs.get_total_flops()


def _output_elements(*args: Any, out_shape: torch.Size, **kwargs: Any) -> int:
    return math.prod(out_shape)


def format_table(rows: list[Counts]) -> str:
    """A table of one family and number of classes, right-aligned, with a footnote on its published column."""
    family = rows[0].family
    head = [
        "variant",
        "depth",
        "width",
        "resolution",
        "input (px)",
        "blocks",
        "params",
        "MACs (M)",
        "FLOPs (M)",
        "activations (M)",
        PUBLISHED_HEAD[family],
    ]
    cells = [head] + [_cells(row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([f"family {family}, {rows[0].num_classes} classes", *lines, FOOTNOTE[family]])


def _cells(row: Counts) -> list[str]:
    published = PUBLISHED[row.family].get(row.variant)
    return [
        row.variant,
        *(f"{value:.5g}" for value in (row.scaling.depth, row.scaling.width, row.scaling.resolution)),
        str(row.input_size),
        str(row.blocks),
        f"{row.params:,}",
        *(f"{value / 1e6:.2f}" for value in (row.macs, row.flops, row.activations)),
        "-" if published is None else f"{published:.2f}",
    ]


def _record(row: Counts) -> dict[str, str | int | float]:
    return {
        "family": row.family,
        "variant": row.variant,
        "num_classes": row.num_classes,
        "depth": row.scaling.depth,
        "width": row.scaling.width,
        "resolution": row.scaling.resolution,
        "input_size": row.input_size,
        "blocks": row.blocks,
        "params": row.params,
        "macs": row.macs,
        "flops": row.flops,
        "activations": row.activations,
    }


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m effnet_fast.summary", description="Parameters, MACs and activations of the variants."
    )
    parser.add_argument("--family", choices=FAMILIES, help="default: both, one table each")
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=VARIANTS, help="default: all")
    parser.add_argument("--num-classes", type=at_least(1), help="default: 10 for reference, 1000 for paper")
    parser.add_argument(
        "--resolution",
        type=at_least(1),
        default=BASE_RESOLUTION,
        help="input size in pixels that the resolution multipliers scale, default: 224",
    )
    parser.add_argument("--strides", type=integers, default=STRIDES, help="of the stem and the stages, with commas")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    args = parser.parse_args(argv)
    tables = []
    for family in [args.family] if args.family else FAMILIES:
        classes = NUM_CLASSES[family] if args.num_classes is None else args.num_classes
        try:
            tables.append([count(variant, family, classes, args.resolution, args.strides) for variant in args.variant])
        except ValueError as error:
            parser.error(f"argument --{error}")
    if args.json:
        print(json.dumps([_record(row) for table in tables for row in table], indent=2))
    else:
        print("\n\n".join(format_table(table) for table in tables))


if __name__ == "__main__":
    main()
