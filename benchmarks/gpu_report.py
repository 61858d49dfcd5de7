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

from benchmarks import gpu_cuda
from benchmarks.gpu_traffic import DEVICES, CudaKernels, Device, Kernels, TritonKernels, step_model
from benchmarks.machine_code import Kernel

VARIANTS = ("b0", "b7")


def kernels_of(backend: str, device: Device) -> Kernels:
    """A backend's kernels on 16-bit activations."""
    return CudaKernels(2, device.multiprocessors) if backend == "cuda" else TritonKernels(2)


def markdown(steps: list[dict[str, float | str]]) -> str:
    """The model's table."""
    lines = [
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
    partial = args.json.with_suffix(".partial")
    report = {"backend": args.backend, "kernels": [asdict(kernel) for kernel in found], "model": steps}
    partial.write_text(json.dumps(report, indent=1))
    os.replace(partial, args.json)
    print(f"\n{markdown(steps)}")
    print(f"{args.json}: {len(found)} kernels", file=sys.stderr)


if __name__ == "__main__":
    main()
