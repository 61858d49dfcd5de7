"""What the compilers make of the Triton kernels, without a GPU.

The launchers run on tensors without memory; what they would launch is compiled ahead of time instead, with the
arguments that they would pass, and the machine code is read. Nothing here shows speed, or behaviour on silicon.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor

from benchmarks.machine_code import INSTRUCTION, Kernel, count, occupancy, resources, run_tool, widths
from effnet_fast.passes import schema  # noqa: F401 defines the ops that the passes belong to
from effnet_fast.passes.triton import depthwise, depthwise_backward, pointwise

ARCHITECTURES = (80, 90, 100)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WINDOWS = tuple((kernel, stride) for kernel in (3, 5, 7) for stride in (1, 2))


@dataclass(frozen=True)
class Launch:
    """One kernel as a launcher would start it."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]

    def arguments(self) -> dict[str, Any]:
        """All of them by name."""
        return {**dict(zip(self.kernel.arg_names, self.args, strict=False)), **self.options}


def launches(call: Callable[[], object]) -> list[Launch]:
    """What a call of launchers would start."""
    recorded: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        recorded.append(Launch(self, args, options))

    with mock.patch.object(JITFunction, "run", record):
        call()
    return recorded


def cases(dtype: torch.dtype, channels: int = 96) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every pass with its most demanding operands, and with the fewest."""

    def activation(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)

    n, size = 32, 56
    v, gate = torch.empty(channels, device="meta"), torch.empty(n, channels, device="meta")
    x = activation(n, channels, size, size)
    yield "", lambda: pointwise.channel_stats(x)
    for silu in (True, False):
        case = "SiLU" if silu else "identity"
        yield case, lambda silu=silu: pointwise.pool(x, v, v, silu)
        yield case, lambda silu=silu: pointwise.backward_sums(x, x, v, v, v, v, silu)
        yield f"{case}, gate", lambda silu=silu: pointwise.apply(x, v, v, silu, gate, None)
        yield (
            f"{case}, gate, pooled",
            lambda silu=silu: pointwise.backward_apply(x, x, v, v, v, silu, gate, gate, v, v),
        )
    yield "identity, gate, residual", lambda: pointwise.apply(x, v, v, False, gate, x)
    for kernel, stride in WINDOWS:
        weight, out = (
            torch.empty(channels, 1, kernel, kernel, device="meta"),
            activation(n, channels, *[size // stride] * 2),
        )
        for case, norm in (("", (None,) * 4), (", BN", (v, v, v, v))):
            case = f"{kernel}x{kernel} / {stride}{case}"

            def stats(weight=weight, norm=norm, stride=stride) -> object:
                return depthwise.dwconv_stats(x, weight, *norm[:2], stride, False)

            def affine(weight=weight, norm=norm, stride=stride) -> object:
                return depthwise.dwconv_affine(x, weight, *norm[:2], v, v, stride, False)

            def backward(weight=weight, norm=norm, stride=stride, out=out) -> object:
                operands = (v, v, v, gate, gate, v, v) if norm[0] is not None else (None,) * 7
                y = out if norm[0] is not None else None
                return depthwise_backward.backward_dwconv(out, y, x, weight, *operands, *norm, stride, False)

            for call in (stats, affine, backward):
                yield case, call


class CompileOnly:
    """Stands in for a GPU's driver: names the architecture to compile for, and can't launch."""

    launcher_cls = utils = None

    def __init__(self, architecture: int) -> None:
        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def _without_memory(value: Any) -> Any:
    if isinstance(value, Tensor):
        return MockTensor(value.dtype)
    if isinstance(value, tuple):
        mapped = map(_without_memory, value)
        return type(value)(*mapped) if hasattr(value, "_fields") else tuple(mapped)
    return value


def compile_launch(launch: Launch, case: str, dtype: str, architecture: int) -> Kernel:
    """Compiles without Triton's cache, and reads the machine code."""
    triton.runtime.driver.set_active(CompileOnly(architecture))
    launch.kernel.device_caches.clear()
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        begin = sum(os.times()[:4])
        compiled = launch.kernel.warmup(*map(_without_memory, launch.args), grid=(1,), **launch.options)
        seconds = sum(os.times()[:4]) - begin
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = resources(run_tool("cuobjdump", "--dump-resource-usage", cubin))
        mix = Counter(INSTRUCTION.findall(run_tool("nvdisasm", "-c", cubin)))
    threads = 32 * compiled.metadata.num_warps
    return Kernel(
        name=launch.kernel.__name__.removesuffix("_kernel"),
        case=case,
        dtype=dtype,
        architecture=architecture,
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        spills=count(mix, "LDL", "STL"),
        shared=compiled.metadata.shared,
        threads=threads,
        occupancy=occupancy(architecture, usage["REG"], compiled.metadata.shared, threads),
        loads=widths(mix, "LDG"),
        stores=widths(mix, "STG"),
        ffma=count(mix, "FFMA"),
        seconds=seconds,
    )


def kernels() -> Iterator[Kernel]:
    """Every kernel of every case, dtype and architecture; the small ones that add up partial results once."""
    for architecture in ARCHITECTURES:
        seen = set()
        for dtype in DTYPES:
            for case, call in cases(DTYPES[dtype]):
                for launch in launches(call):
                    name = launch.kernel.__name__
                    if name.startswith(("merge", "sum")):
                        if name in seen:
                            continue
                        seen.add(name)
                    yield compile_launch(launch, case, dtype, architecture)
