"""The kernels compiled ahead of time for GPUs that need not be there, and what importing them needs."""

import subprocess
import sys

import pytest
import torch
import triton

from benchmarks.gpu_triton import ARCHITECTURES, DTYPES, cases, compile_launch, kernels, launches
from benchmarks.machine_code import Kernel
from effnet_fast.passes.triton import configs
from effnet_fast.passes.triton.depthwise_backward import backward_dwconv_kernel

# Each pass, and the convolutions of EfficientNet; every GPU and every dtype once.
COMPILED = [
    (architecture, dtype, case)
    for architecture, dtype in zip(ARCHITECTURES, DTYPES, strict=True)
    for case in ("", "SiLU", "identity", "3x3 / 1, BN", "3x3 / 2, BN", "5x5 / 1, BN", "5x5 / 2, BN")
]

# The tiles are chosen for Triton 3.8. The compiler of 3.6 allocates registers differently, and spills in a few kernels.
RECENT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
SPILLS = 0 if RECENT else 107


def check(kernel: Kernel) -> None:
    assert kernel.spills <= SPILLS, kernel
    # backward_dwconv: as many channels a thread as registers allow, see passes/triton/configs.py
    channels = {"3": 4, "5": 2, "7": 1}[kernel.case[0]] if kernel.name == "backward_dwconv" else 8
    # merge_moments also loads a single row, which Triton 3.6 does value by value
    narrowest = min(kernel.loads) if RECENT or kernel.name != "merge_moments" else max(kernel.loads)
    assert narrowest >= min(16, channels * DTYPES[kernel.dtype].itemsize), kernel
    # the sums and windows in registers leave room for eight warps
    assert kernel.occupancy >= 0.125, kernel


@pytest.mark.parametrize(
    ("architecture", "dtype", "case"),
    [pytest.param(*c, marks=[pytest.mark.slow] if c[2].startswith("5x5") else []) for c in COMPILED],
)
def test_nothing_spills_and_loads_are_wide(architecture: int, dtype: str, case: str) -> None:
    seen = 0
    for name, call in cases(DTYPES[dtype]):
        if name.split(", gate")[0] != case:
            continue
        for launch in launches(call):
            check(compile_launch(launch, name, dtype, architecture))
            seen += 1
    assert seen


@pytest.mark.slow
def test_every_kernel_of_every_dtype_and_gpu() -> None:
    seen = 0
    for kernel in kernels():
        check(kernel)
        seen += 1
    assert seen > 400


@pytest.mark.slow
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_wider_loads_of_the_backward_pass_would_spill(kernel_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why its threads have so few channels: eight make 16 bytes of bfloat16, but too many sums for the registers."""
    table = configs.TABLES["backward_dwconv"]
    monkeypatch.setitem(table, (kernel_size, 1, 2), configs.Config(32, 64, warps=8))
    (call,) = [
        call
        for case, call in cases(torch.bfloat16)
        if case == f"{kernel_size}x{kernel_size} / 1, BN" and launches(call)[0].kernel is backward_dwconv_kernel
    ]
    wide = compile_launch(launches(call)[0], "", "bfloat16", 90)
    assert set(wide.loads) == {16}
    assert wide.spills > 0


def test_channels_that_are_no_multiple_of_8_are_loaded_one_by_one() -> None:
    """The report can tell: without the multiple there are no wide loads of bfloat16 in a pass over it."""
    name, call = next(iter(cases(torch.bfloat16, channels=100)))
    assert set(compile_launch(launches(call)[0], name, "bfloat16", 90).loads) == {2}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_needs_no_driver() -> None:
    code = """
import torch, triton
from effnet_fast.passes.backend import why_unavailable
print(why_unavailable("triton"), triton.runtime.driver._active, torch.cuda.is_initialized())
"""
    assert run(code) == "None None False"


def test_without_triton_everything_else_works() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from effnet_fast import create_model
from effnet_fast.passes.backend import why_unavailable
create_model("b0", 10, family="paper").eval()(torch.zeros(1, 3, 32, 32))
print(why_unavailable("triton"))
"""
    assert run(code).startswith("effnet_fast.passes.triton does not load: ")
