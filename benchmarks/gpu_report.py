"""What the compiler made of the CUDA passes, and a model of their traffic: ``python -m benchmarks.gpu_report``.

Needs no GPU. Writes a JSON report, and a Markdown table to the standard output. Registers, stack and shared memory are
the compiler's own figures, instruction counts are from the machine code, occupancy follows from the architecture's
limits, and the training step is a roofline model: nothing here is a measurement.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu_traffic import DEVICES, step_model

# threads, blocks, shared KiB of a multiprocessor, and the KiB that each block costs besides its own
LIMITS = {80: (2048, 32, 164, 1), 90: (2048, 32, 228, 1), 100: (2048, 32, 228, 1)}
REGISTERS, PARTITIONS = 65536, 4

STORAGE = {"float": "float32", "__nv_bfloat16": "bfloat16", "__half": "float16"}
MEMORY_BOUND = ("channel_stats", "pool", "apply", "backward_sums", "backward_apply")
# Kernels of which fewer than half of the warps that fit run at once; the reason stands beside each in csrc/cuda.
FEWER_WARPS = ("backward_sums, silu", "backward_apply, silu", "depthwise", "depthwise_backward")


@dataclass
class Kernel:
    """One compiled kernel. kernel_size, stride: 0 where it has none. vector: channels that a thread loads at once."""

    name: str
    dtype: str
    kernel_size: int
    stride: int
    vector: int
    architecture: int
    registers: int
    stack: int
    local: int
    threads: int
    occupancy: float
    loads_16_bytes: int
    stores_16_bytes: int
    loads_local: int
    ffma: int


def tool(name: str) -> str:
    """A CUDA binary tool: on PATH, or as it comes with triton."""
    spec = find_spec("triton")
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name if spec and spec.origin else None
    found = shutil.which(name) or (str(bundled) if bundled and bundled.exists() else None)
    if found is None:
        raise FileNotFoundError(f"{name}: not on PATH, and not in triton")
    return found


def occupancy(architecture: int, registers: int, shared_bytes: int, threads: int) -> float:
    """The share of a multiprocessor's warps that run at once (NVIDIA's occupancy calculator)."""
    most_threads, most_blocks, shared_kib, reserved_kib = LIMITS[architecture]
    warps = -(-threads // 32)
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = REGISTERS // PARTITIONS // per_warp * PARTITIONS // warps
    by_shared = shared_kib * 1024 // (-(-(shared_bytes + reserved_kib * 1024) // 128) * 128)
    blocks = min(by_registers, by_shared, most_threads // 32 // warps, most_blocks)
    return blocks * warps * 32 / most_threads


def launch_of(name: str, kernel_size: int, stride: int) -> tuple[int, int]:
    """(threads, bytes of shared memory) of a block at its largest: the limits of csrc/cuda/plans.h."""
    if name == "depthwise":
        threads = 256 if kernel_size == 7 else 448
        columns = threads // 16 * 2
        return threads, 4 * (2 * stride * ((columns - 1) * stride + kernel_size) * 16 + 2 * 16)
    if name == "depthwise_backward":
        threads = 256 if kernel_size == 7 else 384 if (kernel_size, stride) == (5, 2) else 448
        columns = threads // 16
        return threads, 4 * 16 * (max(2 * (columns + kernel_size - 1), kernel_size * columns) + 7)
    return 256, {"channel_stats": 24576, "pool": 8192, "backward_sums": 8192, "merge_moments": 6144}.get(name, 1024)


def described(symbol: str) -> tuple[str, str, int, int, int]:
    """(name, storage type, kernel size, stride, vector) of a demangled kernel."""
    found = re.match(r"(?:void )?effnet_fast::(\w+?)_kernel(?:<(.*)>\()?", symbol)
    assert found is not None, symbol
    name, arguments = found[1], [re.sub(r"\(\w+\)", "", a.strip()) for a in (found[2] or "").split(",")]
    if name.startswith("depthwise"):
        if len(arguments) > 4:
            name = "depthwise" if "Statistics" in arguments[4] else "depthwise, affine"
        return name, arguments[0], int(arguments[1]), int(arguments[2]), int(arguments[3])
    if len(arguments) > 2 and arguments[2] in ("1", "true"):
        name += ", silu"
    return name, arguments[0] or "float", 0, 0, int(arguments[1]) if len(arguments) > 1 else 1


def demangled(symbols: list[str]) -> dict[str, str]:
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return dict(zip(symbols, done.stdout.splitlines(), strict=True))


def cuobjdump(*arguments: str) -> str:
    program = tool("cuobjdump")
    path = f"{Path(program).parent}{os.pathsep}{os.environ['PATH']}"  # it calls nvdisasm
    environment = {**os.environ, "PATH": path}
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True, env=environment).stdout


def instruction_counts(binary: Path) -> dict[tuple[int, str], Counter[str]]:
    """Instructions of every kernel in a binary, by (architecture, symbol)."""
    counts: dict[tuple[int, str], Counter[str]] = {}
    architecture, current = 0, Counter[str]()
    instruction = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
    for line in cuobjdump("-sass", str(binary)).splitlines():
        if found := re.match(r"\s*code for sm_(\d+)", line):
            architecture = int(found[1])
        elif found := re.match(r"\s*Function : (\S+)", line):
            current = counts[architecture, found[1]] = Counter()
        elif found := instruction.match(line):
            current[found[1]] += 1
    return counts


def kernels(binary: Path) -> list[Kernel]:
    """Every kernel of a binary that nvcc made, for every architecture in it."""
    resources: dict[tuple[int, str], dict[str, int]] = {}
    architecture, symbol = 0, ""
    for line in cuobjdump("--dump-resource-usage", str(binary)).splitlines():
        if found := re.search(r"arch = sm_(\d+)", line):
            architecture = int(found[1])
        elif found := re.match(r"\s*Function ([^:]+):", line):
            symbol = found[1]
        elif "REG:" in line:
            resources[architecture, symbol] = {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", line)}
    names = demangled(sorted({symbol for _, symbol in resources}))
    counts = instruction_counts(binary)
    found_kernels = []
    for (architecture, symbol), usage in resources.items():
        name, storage, kernel_size, stride, vector = described(names[symbol])
        threads, shared_bytes = launch_of(name.split(",")[0], kernel_size, stride)
        mix = counts[architecture, symbol]

        def total(start: str, width: str = "", mix: Counter[str] = mix) -> int:
            return sum(n for op, n in mix.items() if op.startswith(start) and width in op)

        found_kernels.append(
            Kernel(
                name,
                STORAGE[storage],
                kernel_size,
                stride,
                vector,
                architecture,
                usage["REG"],
                usage["STACK"],
                usage["LOCAL"],
                threads,
                occupancy(architecture, usage["REG"], shared_bytes, threads),
                total("LDG", ".128"),
                total("STG", ".128"),
                total("LDL") + total("STL"),
                total("FFMA"),
            )
        )
    return sorted(found_kernels, key=lambda k: (k.name, k.dtype, k.kernel_size, k.stride, k.vector, k.architecture))


def built_extension() -> Path:
    """The CUDA extension of this installation. Raises FileNotFoundError if there is none."""
    spec = find_spec("effnet_fast._cuda")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("effnet_fast._cuda: not built; install with nvcc, or EFFNET_FAST_CUDA=1 to see why not")
    return Path(spec.origin)


def markdown(found: list[Kernel], steps: list[dict[str, float | str]]) -> str:
    """The report as two tables."""
    lines = [
        "| kernel | dtype | k, stride | vector | sm | registers | local | occupancy | LDG.128 | STG.128 | FFMA |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {k.name} | {k.dtype} | {f'{k.kernel_size}, {k.stride}' if k.kernel_size else ''} | {k.vector} |"
        f" {k.architecture} | {k.registers} | {k.stack + k.local} | {k.occupancy:.0%} | {k.loads_16_bytes} |"
        f" {k.stores_16_bytes} | {k.ffma} |"
        for k in found
    ]
    lines += [
        "",
        "Model of a training step's MBConv blocks, bf16, not measured:",
        "",
        "| variant | device | section GB, fused | eager | ratio | in-place SiLU | ratio | blocks ms, fused | eager |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for step in steps:
        eager, cloned = "eager", "eager, in-place SiLU"
        lines.append(
            f"| {step['variant']} | {step['device']} | {step['fused: section GB']:.1f} |"
            f" {step[f'{eager}: section GB']:.1f} | {step[f'section traffic, {eager} / fused']:.2f} |"
            f" {step[f'{cloned}: section GB']:.1f} | {step[f'section traffic, {cloned} / fused']:.2f} |"
            f" {step['fused: blocks ms']:.1f} | {step[f'{eager}: blocks ms']:.1f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("--binary", type=Path, help="what nvcc made; default: the installed extension")
    parser.add_argument("--batch", type=int, default=64, help="images of the modelled step (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=Path("gpu_report.json"), help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        found = kernels(args.binary or built_extension())
    except FileNotFoundError as error:
        parser.error(str(error))
    steps = [step_model(variant, args.batch, 2, device) for variant in ("b0", "b7") for device in DEVICES]
    partial = args.json.with_suffix(".partial")
    partial.write_text(json.dumps({"kernels": [asdict(k) for k in found], "model": steps}, indent=1))
    os.replace(partial, args.json)
    print(markdown(found, steps))
    print(f"{args.json}: {len(found)} kernels", file=sys.stderr)


if __name__ == "__main__":
    main()
