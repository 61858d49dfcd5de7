"""A model of a training step's bytes and FLOPs: the GPU passes, from their own plans, against eager PyTorch's ops.

A model, not a measurement: every byte counts as device memory traffic, once for each time that a kernel asks for it
(halos and partial results included), except where the same block asks again within a few rows.
"""

import ctypes
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from effnet_fast import create_model
from effnet_fast.model import EfficientNet
from effnet_fast.passes.products import WITHOUT_DY
from effnet_fast.passes.schema import PASSES
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
    Device("B200", 148, 7.7e12, 2250e12, 75e12),
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

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.inputs == self.outputs


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


class Kernels(Protocol):
    """A backend's kernels at work on sections of one dtype."""

    size: int  # bytes of a stored value

    def depthwise(self, s: Section, name: str) -> tuple[float, float]:
        """(values of the convolved operand read, halos included; bytes of partial results written and read).

        name: of the pass, "dwconv_stats", "dwconv_affine" or "backward_dwconv".
        """
        ...

    def sums(self, name: str, n: int, c: int, h: int, w: int) -> float:
        """Bytes of the sums of a pass over [n, c, h, w], partial ones included, written and read."""
        ...


def _overlap(begin: int, end: int, size: int) -> int:
    return max(0, min(end, size) - max(begin, 0))


@cache
def _plans() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "plans.so"
        flags = ["-std=c++20", "-O1", "-fPIC", "-shared"]
        subprocess.run(["g++", *flags, str(HERE / "gpu_plans.cpp"), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def depthwise_block(backward: bool, kernel: int, stride: int, value_bytes: int) -> tuple[int, int]:
    """(threads, bytes of shared memory) of a block of csrc/cuda's depthwise kernels at its largest."""
    block = (ctypes.c_int * 2)()
    _plans().depthwise_block(backward, kernel, stride, value_bytes, block)
    return block[0], block[1]


@dataclass(frozen=True)
class CudaKernels:
    """csrc/cuda, whose plans follow from the number of multiprocessors."""

    size: int
    multiprocessors: int

    def depthwise(self, s: Section, name: str) -> tuple[float, float]:
        fields = (ctypes.c_int * 8)()
        pad, backward = s.kernel // 2, name == "backward_dwconv"
        _plans().depthwise_plan(
            backward, ctypes.c_int64(s.n), s.c, s.h, s.w, s.kernel, s.stride, pad, self._vector(s.c),
            self.multiprocessors, fields,
        )  # fmt: skip
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
        sets = {
            "dwconv_stats": 4 * parts,
            "dwconv_affine": s.n * strips * segments,  # of each tile
            "backward_dwconv": (s.kernel**2 + 2) * parts,
        }
        return s.n * s.c * sum(widths) * sum(heights), 2 * 4 * s.c * sets[name]

    def sums(self, name: str, n: int, c: int, h: int, w: int) -> float:
        over_all = name == "channel_stats"
        chunks = _plans().pixel_chunks(over_all, ctypes.c_int64(n), c, h, w, self._vector(c), self.multiprocessors)
        if over_all:
            return 4 * c * (2 * 4 * chunks + 2)
        result = 4 * n * c * {"pool": 1, "backward_sums": 5}[name]
        return result if chunks == 1 else (2 * chunks + 1) * result

    def _vector(self, channels: int) -> int:
        return 16 // self.size if channels % 8 == 0 else 1


@dataclass(frozen=True)
class TritonKernels:
    """passes/triton: what its launchers would launch, on tensors without memory."""

    size: int

    def depthwise(self, s: Section, name: str) -> tuple[float, float]:
        from benchmarks.gpu_triton import launches  # needs triton
        from effnet_fast.passes.triton import depthwise, depthwise_backward

        x, v, gate = self._activation(s.n, s.c, s.h, s.w), self._floats(s.c), self._floats(s.n, s.c)
        weight = self._floats(s.c, 1, s.kernel, s.kernel)
        y = self._activation(s.n, s.c, -(-s.h // s.stride), -(-s.w // s.stride))
        operands = (v, v, v, gate, gate, v, v, v, v, v, v)
        calls = {
            "dwconv_stats": partial(depthwise.dwconv_stats, x, weight, v, v, s.stride, False),
            "dwconv_affine": partial(depthwise.dwconv_affine, x, weight, None, None, v, v, s.stride, False),
            "backward_dwconv": partial(depthwise_backward.backward_dwconv, y, y, x, weight, *operands, s.stride, False),
        }
        launch = launches(calls[name])[0].arguments()
        reach = -(-s.kernel // s.stride)
        rows, pad_h, pad_w = launch["rows"], launch["pad_h"], launch["pad_w"]
        if name == "backward_dwconv":
            strips, read, columns, step = launch["cells"], launch["outputs"], 1, 1
            before, after = reach - 1 - pad_w // s.stride, pad_w // s.stride
            above, below = reach - 1 - pad_h // s.stride, pad_h // s.stride
        else:
            strips, read, columns, step = launch["images"], launch["inputs"], launch["COLUMNS"], s.stride
            before, after = pad_w, s.kernel - s.stride - pad_w
            above, below = pad_h, (reach - 1) * s.stride - pad_h
        across, down = -(-strips.width // columns), -(-strips.height // rows)
        total = strips.count * across * down
        # A program takes BLOCK_P strips one after another: runs of neighbours read the columns between them once.
        edges = torch.cat([torch.arange(0, total, launch["BLOCK_P"]), torch.arange(0, total + 1, across)]).unique()
        first, last = edges[:-1], edges[1:] - 1
        left, right = first % across * columns * step, (last % across + 1) * columns * step
        top = first // across % down * rows * step
        widths = (right + after).clamp(max=read.width) - (left - before).clamp(min=0)
        heights = (top + rows * step + below).clamp(max=read.height) - (top - above).clamp(min=0)
        return s.c * int((widths * heights).sum()), 2 * 4 * launch["partials"].numel()

    def sums(self, name: str, n: int, c: int, h: int, w: int) -> float:
        from benchmarks.gpu_triton import launches
        from effnet_fast.passes.triton import pointwise

        x, v = self._activation(n, c, h, w), self._floats(c)
        calls = {
            "channel_stats": partial(pointwise.channel_stats, x),
            "pool": partial(pointwise.pool, x, v, v, True),
            "backward_sums": partial(pointwise.backward_sums, x, x, v, v, v, v, True),
        }
        first, *rest = [launch.arguments() for launch in launches(calls[name])]
        partials = 4 * first["partials"].numel()
        if name == "channel_stats":
            return 2 * partials + 4 * 2 * c
        return 2 * partials + 4 * rest[0]["result"].numel() if rest else partials

    def _activation(self, *shape: int) -> Tensor:
        dtype = {2: torch.bfloat16, 4: torch.float32}[self.size]
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)

    def _floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, device="meta")


def fused_section(s: Section, kernels: Kernels) -> Iterator[Work]:
    """The passes from the expand convolution's output to the gated output, forward and backward.

    With those that the products around them are composed of: `passes/products.py`.
    """
    x, y = s.x * kernels.size, s.y * kernels.size
    on_x, on_y = (s.n, s.c, s.h, s.w), (s.n, s.c, -(-s.h // s.stride), -(-s.w // s.stride))
    taps = s.kernel**2
    read, partials = kernels.depthwise(s, "dwconv_stats")
    if s.expanded:
        yield Work("channel_stats", x + kernels.sums("channel_stats", *on_x), 3 * s.x)
    yield Work("dwconv_stats", read * kernels.size + y + partials, 2 * taps * s.y + 8 * s.x)
    yield Work("pool", y + kernels.sums("pool", *on_y), 8 * s.y)
    yield Work("apply", 2 * y, 9 * s.y)
    yield Work("apply, for the projection's weight gradient", 2 * y, 9 * s.y)
    yield Work("backward_sums", 2 * y + kernels.sums("backward_sums", *on_y), 20 * s.y)
    read, partials = kernels.depthwise(s, "backward_dwconv")
    flops = 4 * taps * s.y + 18 * s.y + 20 * s.x
    yield Work("backward_dwconv", 2 * read * kernels.size + 2 * x + partials, flops)
    if s.expanded and s.x < WITHOUT_DY:
        yield Work("backward_apply", 3 * x, 6 * s.x)
    elif s.expanded:
        # BatchNorm's backward by products of the block's input, which `matrix_products` does not have
        pixels = s.x // s.c
        block_input = pixels * s.inputs * kernels.size
        yield Work("channel_stats, of the input", block_input + kernels.sums("channel_stats", s.n, s.inputs, s.h, s.w))
        yield Work("input' input", block_input, 0, 2 * pixels * s.inputs**2)
        # reads the input, and the gradient around the block and a constant added first; writes what is added to
        added = 3 * block_input if s.residual else 0
        yield Work("input W' b W, added", 3 * block_input + added, 0, 2 * pixels * s.inputs**2)


def bytes_per_element(s: Section, kernels: Kernels) -> dict[str, float]:
    """What every pass moves for a value of the activation that it walks over: the convolution's input, or its output.

    With all of its activations as operands, and without a residual.
    """
    moved = {work.name: work.bytes for work in fused_section(s, kernels)}
    read, partials = kernels.depthwise(s, "dwconv_affine")
    moved["dwconv_affine"] = (read + s.y) * kernels.size + partials
    moved["backward_apply"] = 3 * s.y * kernels.size
    over_input = ("channel_stats", "dwconv_stats", "dwconv_affine", "backward_dwconv")
    return {name: moved[name] / (s.x if name in over_input else s.y) for name in PASSES}


class OpTraffic(TorchDispatchMode):
    """Every op that PyTorch runs: its operands and results move once, those that two of its kernels read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.works: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name == "ones_like":  # ones_like: the gradient that the backward pass begins with
            return out
        results = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]
        moved = [t for t in (*args, *results) if isinstance(t, Tensor)]
        if name == "native_batch_norm":  # statistics, then values
            moved.append(args[0])
        elif name == "native_batch_norm_backward":  # sums, then values
            moved += args[:2]
        elif name == "convolution_backward":  # of the input, then of the weight
            moved.append(args[0])
        flops = 0
        if name.startswith("convolution"):
            outputs, weight, products = (args[0], args[2], 2) if "backward" in name else (out, args[1], 1)
            flops = 2 * products * outputs.numel() * weight[0].numel()
        self.works.append(Work(name, sum(map(_bytes, moved)), flops))
        return out


def _bytes(t: Tensor) -> int:
    """Of the memory behind a tensor, expanded dimensions counted once."""
    values = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        values *= size if stride else min(size, 1)
    return values * t.element_size()


@cache
def eager_section(s: Section, dtype: torch.dtype, inplace: bool) -> tuple[Work, ...]:
    """The same in plain PyTorch, as it runs op by op. inplace: SiLU, as in torchvision's model."""

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

    def norm_silu(x: Tensor) -> Tensor:
        return F.silu(F.batch_norm(x, None, None, leaf(s.c), leaf(s.c), training=True), inplace)

    squeezed = max(1, s.inputs // 4)
    x, weight = leaf(s.n, s.c, s.h, s.w, dtype=dtype), leaf(s.c, 1, s.kernel, s.kernel, dtype=dtype)
    reduce, expand = leaf(squeezed, s.c, 1, 1, dtype=dtype), leaf(s.c, squeezed, 1, 1, dtype=dtype)
    with OpTraffic() as traffic:
        z = norm_silu(x) if s.expanded else x
        z = norm_silu(F.conv2d(z, weight, stride=s.stride, padding=s.kernel // 2, groups=s.c))
        gate = F.conv2d(F.silu(F.conv2d(z.mean((2, 3), keepdim=True), reduce), inplace), expand).sigmoid()
        out = gate * z
    grad = torch.empty_like(out)
    with traffic:
        out.backward(grad)
    return tuple(traffic.works)


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
    residual = p if s.residual else 0
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


@cache
def without_memory(variant: str) -> EfficientNet:
    """The paper family's model on the meta device."""
    with torch.device("meta"):
        return create_model(variant, family="paper")


def input_size(variant: str) -> int:
    return get_family("paper").input_size(get_variant(variant, "paper").scaling)


def stem_and_head(variant: str, blocks: list[Section], size: int, fused: bool) -> Iterator[Work]:
    """What is before and after the blocks: PyTorch's convolutions, BatchNorm and SiLU, the mean and the classifier."""
    model, n, pixels_out = without_memory(variant), blocks[0].n, blocks[-1].y // blocks[-1].c
    for name, conv, before, after in (
        ("stem", model.stem.conv, n * input_size(variant) ** 2, n * blocks[0].h * blocks[0].w),
        ("head", model.head.conv, pixels_out, pixels_out),
    ):
        stored = after * conv.out_channels * size
        moved, flops = before * conv.in_channels * size + stored, 2 * after * conv.weight.numel()
        yield Work(name, moved, 0, flops)
        yield Work(f"{name} backward: weight", moved, 0, flops)
        if name == "head":  # nobody asks for the image's gradient
            yield Work(f"{name} backward: input", moved, 0, flops)
            yield Work("mean", stored)
            yield Work("mean backward", stored)
        if fused:
            yield from (Work("channel_stats", stored), Work("apply", 2 * stored))
            yield from (Work("backward_sums", 2 * stored), Work("backward_apply", 3 * stored))
        else:
            yield from (Work("batch_norm", 3 * stored), Work("silu", 2 * stored))
            yield from (Work("silu backward", 3 * stored), Work("batch_norm backward", 5 * stored))
    classes, features = model.classifier.weight.shape
    for name in ("classifier", "classifier backward: input", "classifier backward: weight"):
        moved = (n * (features + classes) + classes * features) * size
        yield Work(name, moved, 0, 2 * n * features * classes)


def sections(variant: str, batch: int) -> list[Section]:
    """Every block's section at the variant's own resolution, in the paper's family."""
    size = -(-input_size(variant) // 2)
    found = []
    for stage in without_memory(variant).stages:
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


def step_model(variant: str, batch: int, kernels: Kernels, device: Device) -> dict[str, float | str]:
    """A training step, forward and backward: gigabytes and roofline milliseconds, fused and eager."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[kernels.size]
    result: dict[str, float | str] = {"variant": variant, "batch": batch, "device": device.name}
    blocks = sections(variant, batch)
    of_sections = {
        "fused": [work for s in blocks for work in fused_section(s, kernels)],
        "eager": [work for s in blocks for work in eager_section(s, dtype, False)],
        "eager, in-place SiLU": [work for s in blocks for work in eager_section(s, dtype, True)],
    }
    section_bytes, milliseconds = {}, {}
    for kind, works in of_sections.items():
        around = list(stem_and_head(variant, blocks, kernels.size, kind == "fused"))
        for s in blocks:
            around += (*matrix_products(s, kernels.size), *project_norm(s, kernels.size, kind == "fused"))
        section_bytes[kind] = sum(work.bytes for work in works)
        milliseconds[kind] = 1e3 * sum(work.seconds(device) for work in works + around)
        result[f"{kind}: section GB"] = section_bytes[kind] / 1e9
        result[f"{kind}: step GB"] = sum(work.bytes for work in works + around) / 1e9
        result[f"{kind}: step ms"] = milliseconds[kind]
    for kind in ("eager", "eager, in-place SiLU"):
        result[f"section traffic, {kind} / fused"] = section_bytes[kind] / section_bytes["fused"]
        result[f"roofline, {kind} / fused"] = milliseconds[kind] / milliseconds["fused"]
    return result
