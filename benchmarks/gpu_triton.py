"""What the compilers make of the Triton kernels, without a GPU: ``python -m benchmarks.gpu_triton``.

The launchers run on tensors without memory; what they would launch is compiled ahead of time instead, with the
arguments that they would pass, and the machine code is read. Nothing here shows speed, or behaviour on silicon.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor

from effnet_fast.passes import schema  # noqa: F401 defines the ops that the passes belong to
from effnet_fast.passes.triton import depthwise, depthwise_backward, pointwise

ARCHITECTURES = (80, 90, 100)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WINDOWS = tuple((kernel, stride) for kernel in (3, 5, 7) for stride in (1, 2))

# Per multiprocessor: threads, blocks, KiB of shared memory (CUDA C++ Programming Guide, compute capabilities).
LIMITS = {80: (2048, 32, 164), 90: (2048, 32, 228), 100: (2048, 32, 228)}


@dataclass(frozen=True)
class Facts:
    """A compiled kernel. Bytes of stack a thread and of shared memory a block; loads and stores by width in bytes.

    spills: instructions that read or write the stack. seconds: of processor time, to compile it.
    """

    kernel: str
    case: str
    dtype: str
    architecture: int
    registers: int
    stack: int
    spills: int
    shared: int
    warps: int
    occupancy: float
    loads: dict[int, int]
    stores: dict[int, int]
    instructions: int
    seconds: float

    def line(self) -> str:
        widths = " ".join(f"{count}x{width}" for width, count in sorted(self.loads.items(), reverse=True))
        return (
            f"| {self.kernel} | {self.case} | {self.dtype} | sm_{self.architecture} | {self.registers} | {self.spills} "
            f"| {self.shared} | {self.occupancy:.0%} | {widths} | {self.instructions} | {self.seconds:.1f} |"
        )


HEADER = (
    "| kernel | case | dtype | GPU | registers | spills | shared | occupancy | loads (bytes) | instructions | "
    "compiled in, s |\n" + "|---" * 11 + "|"
)


@dataclass(frozen=True)
class Launch:
    """One kernel as a launcher would start it."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


def occupancy(architecture: int, registers: int, shared: int, warps: int) -> float:
    """Resident warps over the most that a multiprocessor holds (as NVIDIA's occupancy calculator counts)."""
    threads, blocks, kib = LIMITS[architecture]
    registers_per_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // 4 // registers_per_warp * 4 // warps
    by_shared = kib * 1024 // (-(-(shared + 1024) // 128) * 128)
    resident = min(by_registers, by_shared, threads // 32 // warps, blocks)
    return resident * warps * 32 / threads


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


def compile_launch(launch: Launch, case: str, dtype: str, architecture: int) -> Facts:
    """Compiles without Triton's cache, and reads the machine code."""
    triton.runtime.driver.set_active(CompileOnly(architecture))
    launch.kernel.device_caches.clear()
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        begin = sum(os.times()[:4])
        compiled = launch.kernel.warmup(*map(_without_memory, launch.args), grid=(1,), **launch.options)
        seconds = sum(os.times()[:4]) - begin
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, code = _tool("cuobjdump", "--dump-resource-usage", cubin), _tool("nvdisasm", "-c", cubin)
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE)
    warps = compiled.metadata.num_warps
    return Facts(
        kernel=launch.kernel.__name__.removesuffix("_kernel"),
        case=case,
        dtype=dtype,
        architecture=architecture,
        registers=resources["REG"],
        stack=resources["STACK"] + resources["LOCAL"],
        spills=sum(opcode.startswith(("STL", "LDL")) for opcode in opcodes),
        shared=compiled.metadata.shared,
        warps=warps,
        occupancy=occupancy(architecture, resources["REG"], compiled.metadata.shared, warps),
        loads=_widths(opcodes, "LDG"),
        stores=_widths(opcodes, "STG"),
        instructions=len(opcodes),
        seconds=seconds,
    )


def _tool(name: str, *args: object) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *map(str, args)], capture_output=True, text=True, check=True).stdout


def _widths(opcodes: list[str], instruction: str) -> dict[int, int]:
    widths: dict[int, int] = {}
    for opcode in opcodes:
        name, *modifiers = opcode.split(".")
        if name == instruction:
            sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1}
            width = next((sizes[m] for m in modifiers if m in sizes), 4)
            widths[width] = widths.get(width, 0) + 1
    return widths


def report(architectures: tuple[int, ...] = ARCHITECTURES, dtypes: tuple[str, ...] = tuple(DTYPES)) -> Iterator[Facts]:
    """Every kernel of every case; the small kernels that add up partial results once."""
    for architecture in architectures:
        seen = set()
        for dtype in dtypes:
            for case, call in cases(DTYPES[dtype]):
                for launch in launches(call):
                    name = launch.kernel.__name__
                    if name.startswith(("merge", "sum")):
                        if name in seen:
                            continue
                        seen.add(name)
                    yield compile_launch(launch, case, dtype, architecture)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_triton", description=__doc__)
    parser.add_argument("--architecture", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    figures = []
    print(HEADER)
    for facts in report(tuple(args.architecture), tuple(args.dtype)):
        print(facts.line(), flush=True)
        figures.append(asdict(facts))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
