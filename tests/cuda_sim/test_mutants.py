"""The suite can fail: without any one of the kernels' barriers, or with a bound that is one too wide, it does."""

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.cuda_sim import build
from tests.cuda_sim.conftest import ORDERS, Simulate
from tests.cuda_sim.test_passes import check
from tests.passes.samples import Call, algebra_calls, depthwise_calls, elementwise_calls

BARRIERS = [
    (path.name, number)
    for path in sorted(build.KERNELS.glob("*.cuh"))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if "__syncthreads();" in line
]


def calls() -> Iterator[Call]:
    """Few, but with several tiles, rows and groups of channels to a block."""
    for shape in ((3, 40, 9, 6), (2, 13, 4, 31)):
        yield from elementwise_calls(shape, torch.float32)
        yield from depthwise_calls(shape, torch.float32, 3, 1, False)
        yield from depthwise_calls(shape, torch.float32, 5, 2, True)
    yield from algebra_calls(3, 300, 40)


def killer(passes: SimpleNamespace, simulate: Simulate) -> str | None:
    """The first pass that gives a wrong result, and in which order of threads."""
    for order, name in zip(ORDERS, ("forward", "reverse", "random"), strict=True):
        for multiprocessors in (1, 8):
            simulate(order, multiprocessors)
            for call in calls():
                try:
                    check(passes, call, torch.float32)
                except (AssertionError, RuntimeError) as error:
                    return f"{call.name}, threads in {name} order: {str(error).splitlines()[0]}"
    return None


def test_the_kernels_as_they_are_survive(passes: SimpleNamespace, simulate: Simulate) -> None:
    assert killer(passes, simulate) is None


@pytest.mark.parametrize(("file", "line"), BARRIERS)
def test_without_one_barrier(
    passes: SimpleNamespace, simulate: Simulate, simulator: ctypes.CDLL, file: str, line: int
) -> None:
    simulator.skip_barrier(file.encode(), line)
    try:
        killed_by = killer(passes, simulate)
    finally:
        simulator.skip_barrier(b"", 0)
    print(f"{file}:{line}: {killed_by}")
    assert killed_by is not None


# (file, bound, one too wide)
BOUNDS = [
    ("sheet.cuh", "(unsigned)(row + r) < (unsigned)height", "(unsigned)(row + r) <= (unsigned)height"),
    ("depthwise_backward.cuh", "(unsigned)row < (unsigned)s.h &&", "(unsigned)row <= (unsigned)s.h &&"),
    ("reductions.cuh", "value < values)", "value <= values)"),
    ("algebra.cuh", "first_row + mine < rows)", "first_row + mine <= rows)"),
    ("algebra.cuh", "column < columns)", "column <= columns)"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "bound", "wider"), BOUNDS)
def test_with_a_wider_bound(file: str, bound: str, wider: str, tmp_path: Path) -> None:
    kernels = tmp_path / "cuda"
    kernels.mkdir()
    for path in build.KERNELS.iterdir():
        text = path.read_text()
        if path.name == file:
            assert text.count(bound) >= 1
            text = text.replace(bound, wider)
        (kernels / path.name).write_text(text)
    program = build.sanitized_program(kernels, "address,undefined", tmp_path)
    done = subprocess.run([program], capture_output=True, text=True)
    reason = [line for line in done.stderr.splitlines() if "ERROR" in line]
    print(f"{file}: {wider}: {reason[:1]}")
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
