"""What was built, what runs here, and why not: ``python -m effnet_fast.doctor``."""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from effnet_fast import _host
from effnet_fast.cli import ArgumentParser
from effnet_fast.passes.backend import cpu_isa, current, why_not, why_unavailable

ISAS = ("amx", "avx512", "avx2", "baseline")


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def report() -> Iterator[tuple[str, str]]:
    """(fact, value) lines."""
    yield "processor", f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch"
    yield "torch", f"{torch.__version__}; effnet_fast was built with {_host.torch_version}"
    yield "compiler", _host.compiler
    supported = _host.supported_isas()
    for isa in ISAS:
        built = find_spec(f"effnet_fast._cpu_{isa}") is not None
        reasons = [] if built else ["not built"]
        if isa not in supported:
            reasons.append("this processor lacks its instructions")
        yield f"cpu passes, {isa}", " and ".join(reasons) or "built, runs here"
    yield "instruction set in use", cpu_isa()
    yield "backend", current()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        reason = why_not("cpu", torch.empty(1, 8, 1, 1, dtype=dtype))
        yield f"{str(dtype).removeprefix('torch.')} on the CPU", reason or "compiled passes"
    yield (
        "depthwise convolutions",
        "kernel 3, 5 or 7, stride 1 or 2, on the CPU channels a multiple of 8; others take eager PyTorch",
    )
    yield "CUDA", torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    yield "CUDA passes", _gpu_passes("cuda")
    yield "Triton passes", _gpu_passes("triton")


def _gpu_passes(backend: str) -> str:
    reason = why_unavailable(backend)
    if reason is None and torch.cuda.is_available():
        reason = why_not(backend, torch.empty(1, 8, 1, 1, device="cuda"))
        return reason or "built, runs here"
    if reason is None:
        return "built, no device to run on"
    if backend == "cuda" and find_spec("effnet_fast._cuda") is None:
        if torch.version.cuda is None:
            return f"{reason}: this torch has no CUDA"
        if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
            return f"{reason}: no nvcc on PATH, and CUDA_HOME is not set"
        return f"{reason}: install again with EFFNET_FAST_CUDA=1 to see why"
    return reason


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m effnet_fast.doctor", description=__doc__)
    parser.parse_args(argv)
    try:
        lines = list(report())
    except ValueError as error:
        parser.error(str(error))
    width = max(len(fact) for fact, _ in lines)
    for fact, value in lines:
        print(f"{fact:{width}}  {value}")


if __name__ == "__main__":
    main()
