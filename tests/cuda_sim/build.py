"""Compiles the CUDA passes with the host compiler, behind the simulator, and registers them with torch."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc" / "cuda"
SIMULATOR = Path(__file__).parent


def cuda_include() -> Path | None:
    """The folder of CUDA's own headers, if there is a toolkit."""
    for toolkit in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if toolkit and (Path(toolkit) / "include" / "cuda_bf16.h").exists():
            return Path(toolkit) / "include"
    return None


def compile_flags(*extra: str) -> list[str]:
    """g++'s flags for kernels and bindings."""
    headers = [SIMULATOR, cuda_include(), *include_paths()]
    return [
        *("g++", "-std=c++20", "-fPIC", "-fno-strict-aliasing", "-w", "-DEFFNET_FAST_SIMULATED", *extra),
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        *(f"-I{path}" for path in headers),
    ]


def compile_objects(sources: Iterable[Path], flags: list[str], folder: Path) -> list[str]:
    """Compiles each file into the folder, two at a time."""

    def one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        done = subprocess.run(
            [*flags, "-x", "c++", "-c", str(source), "-o", str(target)], capture_output=True, text=True
        )
        assert done.returncode == 0, f"{source.name}: {done.stderr[-3000:]}"
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, sources))


def library() -> Path:
    """The simulated passes as a shared library, compiled again when a source changes."""
    sources = [*KERNELS.glob("*.cu"), SIMULATOR / "bindings.cpp", SIMULATOR / "simulator.cpp"]
    texts = [*sources, *KERNELS.glob("*h"), ROOT / "csrc" / "bindings" / "cuda_passes.h", SIMULATOR / "simulator.h"]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(texts)))
    key.update(torch.__version__.encode())
    built = ROOT / "build" / f"cuda_sim_{key.hexdigest()[:16]}.so"
    if not built.exists():
        folder = built.with_suffix(f".{os.getpid()}")
        folder.mkdir(parents=True)
        objects = compile_objects(sorted(sources), compile_flags("-O1"), folder)
        libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]
        subprocess.run(["g++", "-shared", "-o", str(folder / "sim.so"), *objects, *libraries], check=True)
        os.replace(folder / "sim.so", built)
        shutil.rmtree(folder)
    return built


def load(path: Path) -> ctypes.CDLL:
    """Loads a library of simulated passes; torch.ops.effnet_fast_simulated then runs them on CPU tensors."""
    return ctypes.CDLL(str(path))


def sanitized_program(kernels: Path, sanitizers: str, folder: Path) -> Path:
    """A program that runs every pass once under these sanitizers (as of g++ -fsanitize), over OS threads."""
    flags = ["-O0", "-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-DEFFNET_FAST_OS_THREADS"]
    sources = [SIMULATOR / "sanitize.cpp", SIMULATOR / "simulator.cpp"]
    objects = compile_objects(sources, compile_flags(*flags, f"-I{kernels}"), folder)
    program = folder / "sanitize"
    subprocess.run(["g++", f"-fsanitize={sanitizers}", "-o", str(program), *objects, "-lpthread"], check=True)
    return program
