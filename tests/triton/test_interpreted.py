"""Runs the kernels' tests in Triton's interpreter, which has to be chosen before triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILES = ("interpreted_forward.py", "interpreted_backward.py")


@pytest.mark.parametrize(("marker", "least"), [("not slow", 200), pytest.param("slow", 100, marks=pytest.mark.slow)])
def test_every_pass_in_the_interpreter(marker: str, least: int) -> None:
    """Both files at once, each in a process of its own."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*command, str(here / file)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for file in FILES
    ]
    outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    passed = sum(int(re.findall(r"(\d+) passed", output)[-1]) for output in outputs)
    assert passed >= least
