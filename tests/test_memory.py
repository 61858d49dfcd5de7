import os
import subprocess
import sys

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
