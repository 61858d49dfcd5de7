"""Compiles the native extensions; everything else about the package is in pyproject.toml."""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.sdist import sdist
from torch.utils.cpp_extension import BuildExtension, CppExtension

# One source, one module per instruction set; the best that the processor runs is loaded at import.
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mprefer-vector-width=512"),
    ]
    ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512"], "-mamx-tile", "-mamx-bf16"]


def cpu_passes(isa: str) -> Extension:
    return CppExtension(
        f"effnet_fast._cpu_{isa}",
        [f"csrc/cpu/{isa}.cpp"],
        depends=["setup.py", *sorted(glob("csrc/cpu/*.h"))],
        # The stable ABI of torch 2.11: one build serves that and every later torch.
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
        # Loops with a square root are vectorized only where it need not set errno.
        extra_compile_args=["-O3", "-g0", "-std=c++20", "-fno-math-errno", *ISA_FLAGS[isa]],
    )


host = CppExtension(
    "effnet_fast._host",
    ["csrc/bindings/host.cpp"],
    define_macros=[("EFFNET_FAST_TORCH_VERSION", f'"{torch.__version__}"')],
    extra_compile_args=["-O2", "-g0", "-std=c++20"],
)

# The GPU architectures that the CUDA passes are compiled for; the last also as PTX, for those to come.
CUDA_ARCHITECTURES = tuple((os.environ.get("EFFNET_FAST_CUDA_ARCHITECTURES") or "80,90").split(","))
CUDA_SOURCES = ("passes_float", "passes_bfloat16", "passes_half", "algebra")


def cuda_toolkit() -> Path | None:
    """The folder of the CUDA toolkit: CUDA_HOME, or what nvcc itself says, which may be a wrapper on PATH."""
    if os.environ.get("CUDA_HOME"):
        return Path(os.environ["CUDA_HOME"])
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    done = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.*)$", done.stderr + done.stdout, re.MULTILINE)
    return Path(found[1].strip()).resolve() if found else None


def cuda_passes() -> list[Extension]:
    """The CUDA extension where it can be built: none if it can't, an error if EFFNET_FAST_CUDA=1 insists on it."""
    choice = os.environ.get("EFFNET_FAST_CUDA")
    if choice not in (None, "", "0", "1"):
        raise ValueError(f"EFFNET_FAST_CUDA: got {choice!r}, must be 0 or 1")
    toolkit = cuda_toolkit()
    reason = None
    if torch.version.cuda is None:
        reason = "this torch has no CUDA"
    elif toolkit is None or not (toolkit / "include" / "cuda_runtime.h").exists():
        reason = "no CUDA toolkit: nvcc is not on PATH, and CUDA_HOME is not set to one"
    elif toolkit_version(toolkit) != torch.version.cuda.split(".")[0]:
        reason = f"torch is for CUDA {torch.version.cuda}, the toolkit in {toolkit} is for another"
    if choice == "1" and reason:
        raise RuntimeError(f"EFFNET_FAST_CUDA=1: {reason}")
    if choice == "0" or reason:
        return []
    macros = [
        ("TORCH_TARGET_VERSION", "0x020b000000000000"),
        ("USE_CUDA", None),
        ("EFFNET_FAST_LOWEST_CAPABILITY", min(CUDA_ARCHITECTURES, key=int)),
    ]
    return [
        CppExtension(
            "effnet_fast._cuda",
            ["csrc/bindings/cuda.cpp"],
            depends=["csrc/bindings/cuda_passes.h", *map(str, Path("csrc/cuda").glob("*"))],
            include_dirs=[str(toolkit / "include")],
            library_dirs=[str(folder) for folder in (toolkit / "lib64", toolkit / "lib") if folder.exists()],
            libraries=["cudart", "torch_cuda"],
            define_macros=macros,
            extra_compile_args=["-O2", "-g0", "-std=c++20"],
            optional=choice != "1",
        )
    ]


def toolkit_version(toolkit: Path) -> str | None:
    """The toolkit's major version."""
    found = re.search(r"#define CUDART_VERSION\s+(\d+)", (toolkit / "include" / "cuda_runtime_api.h").read_text())
    return str(int(found[1]) // 1000) if found else None


def compile_kernels(extension: Extension, folder: Path) -> None:
    """Compiles the kernels with nvcc, one file beside another, and adds them to the extension's link."""
    nvcc = Path(extension.include_dirs[0]).parent / "bin" / "nvcc"
    folder.mkdir(parents=True, exist_ok=True)
    architectures = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
    architectures.append(f"-gencode=arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}")
    flags = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC", *architectures]

    def compile_one(source: str) -> str:
        target = str(folder / f"{source}.o")
        subprocess.run([str(nvcc), *flags, "-c", f"csrc/cuda/{source}.cu", "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        extension.extra_objects = list(pool.map(compile_one, CUDA_SOURCES))


class BuildPasses(BuildExtension):
    """Builds the extensions; an optional one that fails is left out, and said so.

    CPU passes of an earlier editable install are kept unless their sources are newer: they take minutes to compile.
    """

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        installed = Path("effnet_fast") / target.name
        if self.editable_mode and extension.name.startswith("effnet_fast._cpu_") and installed.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(installed, target)  # as old as it is: setuptools compiles what is older than its sources
        try:
            if extension.name == "effnet_fast._cuda":
                compile_kernels(extension, Path(self.build_temp) / "cuda")
            super().build_extension(extension)
        except Exception as error:
            if not extension.optional:
                raise
            print(f"{extension.name}: left out, it does not build: {error}", file=sys.stderr)


class SourceDistribution(sdist):
    """All sources: the extensions alone would bring only those that can be built here."""

    def make_distribution(self) -> None:
        for folder in ("csrc", "tests", "benchmarks"):
            self.filelist.graft(folder)
        self.filelist.global_exclude("*.py[cod]")
        super().make_distribution()


setup(
    ext_modules=[host, *map(cpu_passes, ISA_FLAGS), *cuda_passes()],
    # Extensions in parallel (one source each) rather than ninja's parallel sources of one extension.
    cmdclass={"build_ext": BuildPasses.with_options(use_ninja=False), "sdist": SourceDistribution},
    options={"build_ext": {"parallel": True}},
)
