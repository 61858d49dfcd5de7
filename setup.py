"""Compiles the native extensions; everything else about the package is in pyproject.toml."""

import platform
from glob import glob

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# One source, one module per instruction set; the best that the processor runs is loaded at import.
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mprefer-vector-width=512"),
    ]


def cpu_passes(isa: str) -> Extension:
    return CppExtension(
        f"effnet_fast._cpu_{isa}",
        [f"csrc/cpu/{isa}.cpp"],
        depends=sorted(glob("csrc/cpu/*.h")),
        # The stable ABI of torch 2.11: one build serves that and every later torch.
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
        extra_compile_args=["-O3", "-g0", "-std=c++20", *ISA_FLAGS[isa]],
    )


host = CppExtension(
    "effnet_fast._host",
    ["csrc/bindings/host.cpp"],
    define_macros=[("EFFNET_FAST_TORCH_VERSION", f'"{torch.__version__}"')],
    extra_compile_args=["-O2", "-g0", "-std=c++20"],
)

setup(
    ext_modules=[host, *map(cpu_passes, ISA_FLAGS)],
    # Extensions in parallel (one source each) rather than ninja's parallel sources of one extension.
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
    options={"build_ext": {"parallel": True}},
)
