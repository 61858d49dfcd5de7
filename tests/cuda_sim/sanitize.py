"""Runs every CUDA pass, simulated, under sanitizers: ``python -m tests.cuda_sim.sanitize``."""

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cuda_sim.build import KERNELS, cuda_include, sanitized_program


def main() -> None:
    if cuda_include() is None:
        sys.exit("no CUDA toolkit: its headers are needed, in CUDA_HOME or /usr/local/cuda")
    for sanitizers in ("address,undefined", "thread"):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([sanitized_program(KERNELS, sanitizers, Path(folder))])
        print(f"-fsanitize={sanitizers}: {'clean' if done.returncode == 0 else 'failed'}")
        if done.returncode:
            sys.exit(1)


if __name__ == "__main__":
    main()
