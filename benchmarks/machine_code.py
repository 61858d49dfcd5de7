"""What NVIDIA's binary tools say of compiled kernels, whoever compiled them."""

import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# threads, blocks, KiB of shared memory of a multiprocessor (CUDA C++ Programming Guide, compute capabilities)
LIMITS = {80: (2048, 32, 164), 90: (2048, 32, 228), 100: (2048, 32, 228)}
REGISTERS, PARTITIONS = 65536, 4
RESERVED_SHARED = 1024  # bytes that each block costs besides its own

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    case: what it was compiled for, besides dtype and architecture. stack: bytes a thread, spilled values among them;
    spills: instructions that access it. shared: bytes a block, at its largest. loads, stores: instructions that access
    global memory, by bytes. seconds: of processor time to compile it; None if it was found compiled.
    """

    name: str
    case: str
    dtype: str
    architecture: int
    registers: int
    stack: int
    spills: int
    shared: int
    threads: int
    occupancy: float
    loads: dict[int, int]
    stores: dict[int, int]
    ffma: int
    seconds: float | None

    HEADER = (
        "| kernel | case | dtype | GPU | registers | stack | spills | shared | occupancy | loads | stores | FFMA |"
        " compiled in, s |\n" + "|---" * 13 + "|"
    )

    def row(self) -> str:
        """Of a Markdown table under HEADER; loads and stores as count x bytes."""
        loads, stores = (
            " ".join(f"{count}x{width}" for width, count in sorted(widths.items(), reverse=True))
            for widths in (self.loads, self.stores)
        )
        seconds = "" if self.seconds is None else f"{self.seconds:.1f}"
        return (
            f"| {self.name} | {self.case} | {self.dtype} | sm_{self.architecture} | {self.registers} | {self.stack} |"
            f" {self.spills} | {self.shared} | {self.occupancy:.0%} | {loads} | {stores} | {self.ffma} | {seconds} |"
        )


def run_tool(name: str, *arguments: object) -> str:
    """The output of a CUDA binary tool, on PATH or as it comes with triton. Raises FileNotFoundError without one."""
    spec = find_spec("triton")
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name if spec and spec.origin else None
    program = shutil.which(name) or (str(bundled) if bundled and bundled.exists() else None)
    if program is None:
        raise FileNotFoundError(f"{name}: not on PATH, and not in triton")
    # cuobjdump calls nvdisasm
    environment = {**os.environ, "PATH": f"{Path(program).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def resources(line: str) -> dict[str, int]:
    """REG, STACK, LOCAL, SHARED and more of a kernel, from a line of ``cuobjdump --dump-resource-usage``."""
    return {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}


def occupancy(architecture: int, registers: int, shared: int, threads: int) -> float:
    """The share of a multiprocessor's warps that run at once (NVIDIA's occupancy calculator)."""
    most_threads, most_blocks, shared_kib = LIMITS[architecture]
    warps = -(-threads // 32)
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = REGISTERS // PARTITIONS // per_warp * PARTITIONS // warps
    by_shared = shared_kib * 1024 // (-(-(shared + RESERVED_SHARED) // 128) * 128)
    blocks = min(by_registers, by_shared, most_threads // 32 // warps, most_blocks)
    return blocks * warps * 32 / most_threads


def count(mix: Counter[str], *starts: str) -> int:
    """Instructions of a mix that start so."""
    return sum(n for opcode, n in mix.items() if opcode.startswith(starts))


def widths(mix: Counter[str], *instructions: str) -> dict[int, int]:
    """How many of some instructions (LDG, LDGSTS, STG) access so many bytes."""
    sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1}
    found: Counter[int] = Counter()
    for opcode, n in mix.items():
        name, *modifiers = opcode.split(".")
        if name in instructions:
            found[next((sizes[m] for m in modifiers if m in sizes), 4)] += n
    return dict(found)
