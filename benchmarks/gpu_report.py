"""What the compilers made of the GPU passes, and a model of their traffic: ``python -m benchmarks.gpu_report``.

Needs no GPU. Writes a JSON report, and Markdown tables to the standard output. Registers, stack and shared memory are
the compilers' own figures, instruction counts are from the machine code, occupancy follows from the architecture's
limits, and the training step is a roofline model: nothing here is a measurement.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import gpu_cuda
from benchmarks.gpu_traffic import (
    DEVICES,
    CudaKernels,
    Device,
    Kernels,
    Section,
    TritonKernels,
    bytes_per_element,
    step_model,
)
from benchmarks.machine_code import Kernel

VARIANTS = ("b0", "b7")
WINDOWS = tuple((kernel, stride) for kernel in (3, 5, 7) for stride in (1, 2))


def kernels_of(backend: str, device: Device, size: int = 2) -> Kernels:
    """A backend's kernels on activations of so many bytes a value."""
    return CudaKernels(size, device.multiprocessors) if backend == "cuda" else TritonKernels(size)


def extremes(values: list[Any]) -> str:
    """The least and the largest."""
    least, largest = min(values), max(values)
    return f"{least}" if least == largest else f"{least} to {largest}"


def summary(kernels: list[Kernel]) -> str:
    """A table with the extremes of every kernel over dtypes, strides and GPUs, where channels are a multiple of 8."""
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        if kernel.case != "scalars" and not kernel.case.endswith(", scalars"):
            window = f" {kernel.case[:3]}" if kernel.case[:1].isdigit() else ""
            groups.setdefault(kernel.name + window, []).append(kernel)
    lines = [
        "| kernel | compiled | registers | spills | shared memory, bytes | occupancy | widest load, bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, group in sorted(groups.items()):
        lines.append(
            f"| {name} | {len(group)} | {extremes([k.registers for k in group])} | {sum(k.spills for k in group)} |"
            f" {extremes([k.shared for k in group])} | {extremes([round(100 * k.occupancy) for k in group])} % |"
            f" {extremes([max(k.loads) for k in group])} |"
        )
    return "\n".join(lines)


def element_traffic(backend: str) -> list[dict[str, float | str]]:
    """Bytes that every pass moves for a value, halos and partial sums included: by window, dtype's bits and GPU."""
    rows: list[dict[str, float | str]] = []
    for kernel, stride in WINDOWS:
        section = Section(64, 144, 56, 56, kernel, stride, True, 24, 24)
        for size in (4, 2):
            for device in DEVICES:
                for name, moved in bytes_per_element(section, kernels_of(backend, device, size)).items():
                    if "dwconv" in name or (kernel, stride) == WINDOWS[0]:
                        case = f"{name} {kernel}x{kernel} / {stride}" if "dwconv" in name else name
                        rows.append({"pass": case, "bits": 8 * size, "device": device.name, "bytes": moved})
    return rows


def element_markdown(rows: list[dict[str, float | str]]) -> str:
    """A table with the extremes over GPUs."""
    lines = ["| bytes moved a value, modelled | float32 | 16 bits |", "|---|---|---|"]
    for name in sorted({row["pass"] for row in rows}):
        cells = []
        for bits in (32, 16):
            moved = [f"{row['bytes']:.2f}" for row in rows if (row["pass"], row["bits"]) == (name, bits)]
            cells.append(extremes(moved))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown(steps: list[dict[str, float | str]]) -> str:
    """The model's table."""
    lines = [
        "A training step, forward and backward, in bf16: a model, not measured. The section is all between the expand",
        "convolution's output and the gated output.",
        "",
        "| variant | device | section GB, fused | eager | ratio | in-place SiLU | ratio | step ms, fused | eager |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for step in steps:
        eager, cloned = "eager", "eager, in-place SiLU"
        lines.append(
            f"| {step['variant']} | {step['device']} | {step['fused: section GB']:.1f} |"
            f" {step[f'{eager}: section GB']:.1f} | {step[f'section traffic, {eager} / fused']:.2f} |"
            f" {step[f'{cloned}: section GB']:.1f} | {step[f'section traffic, {cloned} / fused']:.2f} |"
            f" {step['fused: step ms']:.1f} | {step[f'{eager}: step ms']:.1f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda", help="default: %(default)s")
    parser.add_argument(
        "--binary", type=Path, help="of --backend cuda: what nvcc made; default: the installed extension"
    )
    parser.add_argument("--batch", type=int, default=64, help="images of the modelled step (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=Path("gpu_report.json"), help="default: %(default)s")
    args = parser.parse_args(argv)

    found: list[Kernel] = []
    print(Kernel.HEADER)
    try:
        if args.backend == "cuda":
            compiled = iter(gpu_cuda.kernels(args.binary or gpu_cuda.built_extension()))
        else:
            from benchmarks import gpu_triton  # needs triton

            compiled = gpu_triton.kernels()
        for kernel in compiled:
            print(kernel.row(), flush=True)
            found.append(kernel)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        parser.error(str(error))

    steps = [
        step_model(variant, args.batch, kernels_of(args.backend, device), device)
        for variant in VARIANTS
        for device in DEVICES
    ]
    elements = element_traffic(args.backend)
    partial = args.json.with_suffix(".partial")
    report = {
        "backend": args.backend,
        "kernels": [asdict(kernel) for kernel in found],
        "bytes per element": elements,
        "model": steps,
    }
    partial.write_text(json.dumps(report, indent=1))
    os.replace(partial, args.json)
    print(f"\n{summary(found)}\n\n{element_markdown(elements)}\n\n{markdown(steps)}")
    print(f"{args.json}: {len(found)} kernels", file=sys.stderr)


if __name__ == "__main__":
    main()
