"""A model of a training step's bytes and FLOPs: the CUDA passes, from their own plans, against eager PyTorch's ops.

A model, not a measurement: every byte counts as device memory traffic, once for each time that a kernel asks for it
(halos and partial results included), except where the same block asks again within a few rows.
"""

import ctypes
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from effnet_fast import create_model
from effnet_fast.model import EfficientNet
from effnet_fast.scaling import get_family, get_variant

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Device:
    """A GPU's ceilings."""

    name: str
    multiprocessors: int
    bytes_per_second: float
    matrix_flops: float  # bf16 tensor cores, dense
    flops: float  # fp32


DEVICES = (
    Device("A100 80 GB", 108, 2.04e12, 312e12, 19.5e12),
    Device("H100 SXM", 132, 3.35e12, 989e12, 67e12),
)


@dataclass(frozen=True)
class Section:
    """A block's depthwise convolution: [n, c, h, w] in; `inputs` and `outputs` are the block's own channels."""

    n: int
    c: int
    h: int
    w: int
    kernel: int
    stride: int
    expanded: bool
    inputs: int
    outputs: int

    @property
    def x(self) -> int:
        return self.n * self.c * self.h * self.w

    @property
    def y(self) -> int:
        return self.n * self.c * -(-self.h // self.stride) * -(-self.w // self.stride)


@dataclass(frozen=True)
class Work:
    """A kernel or op: bytes moved, and FLOPs on the plain and on the matrix units."""

    name: str
    bytes: float
    flops: float = 0
    matrix_flops: float = 0

    def seconds(self, device: Device) -> float:
        """The roofline: the slowest of the three."""
        return max(
            self.bytes / device.bytes_per_second,
            self.flops / device.flops,
            self.matrix_flops / device.matrix_flops,
        )


@cache
def _plans() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "plans.so"
        flags = ["-std=c++20", "-O1", "-fPIC", "-shared"]
        subprocess.run(["g++", *flags, str(HERE / "gpu_plans.cpp"), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def _overlap(begin: int, end: int, size: int) -> int:
    return max(0, min(end, size) - max(begin, 0))


def depthwise_bytes(s: Section, backward: bool, size: int, device: Device) -> tuple[float, float]:
    """(bytes of the convolved operand read, halos included; bytes of partial results written and read)."""
    vector = 16 // size if s.c % 8 == 0 else 1
    fields = (ctypes.c_int * 8)()
    pad = s.kernel // 2
    _plans().depthwise_plan(
        backward, ctypes.c_int64(s.n), s.c, s.h, s.w, s.kernel, s.stride, pad, vector, device.multiprocessors, fields
    )
    _, _, columns, strips, rows, segments, _, parts = fields
    out_h, out_w = -(-s.h // s.stride), -(-s.w // s.stride)
    halo = (s.kernel + s.stride - 1) // s.stride - 1
    if backward:
        # positions pad // stride + [0, ...) read the output's rows and columns from `halo` before to their own
        first = pad // s.stride
        widths = (_overlap(first + i * columns - halo, first + (i + 1) * columns, out_w) for i in range(strips))
        heights = (_overlap(first + i * rows - halo, first + (i + 1) * rows, out_h) for i in range(segments))
    else:
        reach = s.kernel - s.stride
        widths = (
            _overlap(i * columns * s.stride - pad, (i + 1) * columns * s.stride - pad + reach, s.w)
            for i in range(strips)
        )
        # whole steps of `stride` rows
        heights = (
            _overlap(i * rows * s.stride - pad, (min((i + 1) * rows, out_h) + halo) * s.stride - pad, s.h)
            for i in range(segments)
        )
    partial = 2 * 4 * parts * s.c * (s.kernel**2 + 2 if backward else 4)
    return s.n * s.c * sum(widths) * sum(heights) * size, partial


def pixel_partials(s: Section, pixels_from: str, sums: int, size: int, device: Device) -> float:
    """Bytes of the partial sums of a pass over e ("x") or y, written and read."""
    h, w = (s.h, s.w) if pixels_from == "x" else (-(-s.h // s.stride), -(-s.w // s.stride))
    vector = 16 // size if s.c % 8 == 0 else 1
    chunks = _plans().pixel_chunks(ctypes.c_int64(s.n), s.c, h, w, vector, device.multiprocessors)
    return 2 * 4 * sums * s.n * s.c * chunks


def fused_section(s: Section, size: int, device: Device) -> Iterator[Work]:
    """The passes from the expand convolution's output to the gated output, forward and backward."""
    x, y = s.x * size, s.y * size
    taps = s.kernel**2
    read, partial = depthwise_bytes(s, False, size, device)
    if s.expanded:
        yield Work("channel_stats", x + pixel_partials(s, "x", 4, size, device), 3 * s.x)
    yield Work("dwconv_stats", read + y + partial, 2 * taps * s.y + 8 * s.x)
    yield Work("pool", y + pixel_partials(s, "y", 1, size, device), 8 * s.y)
    yield Work("apply", 2 * y, 9 * s.y)
    yield Work("backward_sums", 2 * y + pixel_partials(s, "y", 5, size, device), 20 * s.y)
    read, partial = depthwise_bytes(s, True, size, device)
    yield Work("backward_dwconv", 2 * read + 2 * x + partial, 4 * taps * s.y + 18 * s.y + 20 * s.x)
    if s.expanded:
        yield Work("backward_apply", 3 * x, 5 * s.x)


def eager_section(s: Section, size: int, clones: bool) -> Iterator[Work]:
    """The same in eager PyTorch, op by op; clones: of the input of an in-place SiLU, which autograd keeps."""
    x, y = s.x * size, s.y * size
    taps = s.kernel**2
    if s.expanded:
        yield Work("batch_norm", 3 * x)
        yield Work("silu", (4 if clones else 2) * x)
    yield Work("depthwise convolution", x + y, 2 * taps * s.y)
    yield Work("batch_norm", 3 * y)
    yield Work("silu", (4 if clones else 2) * y)
    yield Work("mean", y)
    yield Work("multiply by the gate", 2 * y)
    yield Work("multiply backward: input", 2 * y)
    yield Work("multiply backward: gate", 4 * y)  # the product is stored, then summed
    yield Work("mean backward, added", 3 * y)  # two gradients meet
    yield Work("silu backward", 3 * y)
    yield Work("batch_norm backward", 5 * y)
    yield Work("depthwise backward: input", x + y, 2 * taps * s.y)
    yield Work("depthwise backward: weight", x + y, 2 * taps * s.y)
    if s.expanded:
        yield Work("silu backward", 3 * x)
        yield Work("batch_norm backward", 5 * x)


def matrix_products(s: Section, size: int) -> Iterator[Work]:
    """The expand and project convolutions, forward and backward: the same in both."""
    pixels_in, pixels_out = s.x // s.c, s.y // s.c
    layers = [("project", pixels_out, s.c, s.outputs)]
    if s.expanded:
        layers.append(("expand", pixels_in, s.inputs, s.c))
    for name, pixels, inputs, outputs in layers:
        moved, flops = pixels * (inputs + outputs) * size, 2 * pixels * inputs * outputs
        yield Work(name, moved, 0, flops)
        yield Work(f"{name} backward: input", moved, 0, flops)
        yield Work(f"{name} backward: weight", moved, 0, flops)


def project_norm(s: Section, size: int, fused: bool) -> Iterator[Work]:
    """BatchNorm after the projection, and the residual addition."""
    p = s.y // s.c * s.outputs * size
    residual = p if s.stride == 1 and s.inputs == s.outputs else 0
    if fused:
        yield Work("channel_stats", p)
        yield Work("apply", 2 * p + residual)
        yield Work("backward_sums", 2 * p)
        yield Work("backward_apply", 3 * p)
    else:
        yield Work("batch_norm", 3 * p)
        yield Work("add", 3 * residual)
        yield Work("batch_norm backward", 5 * p)
        yield Work("gradients added", 3 * residual)


def sections(variant: str, batch: int) -> list[Section]:
    """Every block's section at the variant's own resolution, in the paper's family."""
    model: EfficientNet = create_model(variant, family="paper")
    size = -(-get_family("paper").input_size(get_variant(variant, "paper").scaling) // 2)
    found = []
    for stage in model.stages:
        for block in stage:
            conv = block.depthwise.conv
            outputs = block.project.conv.out_channels
            inputs = block.expand.conv.in_channels if block.expand else conv.in_channels
            kernel, stride = conv.kernel_size[0], conv.stride[0]
            found.append(
                Section(batch, conv.in_channels, size, size, kernel, stride, block.expand is not None, inputs, outputs)
            )
            size = -(-size // stride)
    return found


def step_model(variant: str, batch: int, size: int, device: Device) -> dict[str, float | str]:
    """The MBConv blocks of one training step: gigabytes and roofline milliseconds, fused and eager."""
    result: dict[str, float | str] = {"variant": variant, "batch": batch, "device": device.name}
    blocks = sections(variant, batch)
    section_bytes = {}
    for kind in ("fused", "eager", "eager, in-place SiLU"):
        of_sections = [
            work
            for s in blocks
            for work in (fused_section(s, size, device) if kind == "fused" else eager_section(s, size, kind != "eager"))
        ]
        around = [work for s in blocks for work in (*matrix_products(s, size), *project_norm(s, size, kind == "fused"))]
        section_bytes[kind] = sum(work.bytes for work in of_sections)
        result[f"{kind}: section GB"] = section_bytes[kind] / 1e9
        result[f"{kind}: blocks GB"] = sum(work.bytes for work in of_sections + around) / 1e9
        result[f"{kind}: blocks ms"] = 1e3 * sum(work.seconds(device) for work in of_sections + around)
    for kind in ("eager", "eager, in-place SiLU"):
        result[f"section traffic, {kind} / fused"] = section_bytes[kind] / section_bytes["fused"]
        result[f"roofline, {kind} / fused"] = result[f"{kind}: blocks ms"] / result["fused: blocks ms"]  # type: ignore[operator]
    return result
