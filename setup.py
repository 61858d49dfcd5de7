"""Compiles the native extensions; everything else about the package is in pyproject.toml."""

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

build_info = CppExtension(
    "effnet_fast._build_info",
    ["csrc/bindings/build_info.cpp"],
    define_macros=[("EFFNET_FAST_TORCH_VERSION", f'"{torch.__version__}"')],
    extra_compile_args=["-O2", "-std=c++20"],
)

setup(ext_modules=[build_info], cmdclass={"build_ext": BuildExtension})
