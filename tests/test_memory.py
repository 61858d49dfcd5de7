import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effnet_fast.memory import available_bytes, format_bytes, parse_memory, ran_out_of_memory

PROGRAM = """
import resource
import sys
from effnet_fast.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
import torch

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (64, 48, 64):
        torch.ones(size << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


def page_faults(mode: str) -> int:
    # as a program starts, whatever other tests of this process have set
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", PROGRAM, mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_large_tensors_reuse_freed_memory() -> None:
    """176 MiB are 45,000 small pages: touched anew without the setting, and not at all with it."""
    assert page_faults("default") > 10_000
    assert page_faults("keep") < 1_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GB", 8 * 10**9),
        ("7.5GiB", 7.5 * 2**30),
        ("512 MB", 512 * 10**6),
        ("1KiB", 1024),
        (10**9, 10**9),
        ("min", "min"),
    ],
)
def test_amounts_and_policies(text: str | int, expected: float | str) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["8", "8G", "8 gb", "-1GB", "GB", "1e9B", "", "most", 0, -5])
def test_what_is_neither_is_refused(text: str | int) -> None:
    with pytest.raises(
        ValueError, match=r"^memory: got .*, choose from fast, lean, min, or an amount as 8GB or 7.5GiB$"
    ):
        parse_memory(text)


def test_amounts_for_people() -> None:
    assert [format_bytes(n) for n in (1_500_000, 999_949_999, 8 * 10**9)] == ["1.5 MB", "999.9 MB", "8.00 GB"]


def test_available_memory_is_the_machines_or_the_limits() -> None:
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    cpu = torch.device("cpu")
    assert 0 < available_bytes(cpu) < int(meminfo["MemTotal"].split()[0]) * 1024
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + 500_000_000, before[1]))
        assert 100_000_000 < available_bytes(cpu) < 500_000_000
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_failed_allocations_are_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out_of_memory(error.value)
    assert ran_out_of_memory(MemoryError())
    assert ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not ran_out_of_memory(RuntimeError("shape mismatch"))
