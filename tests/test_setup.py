"""What setup.py builds, keeps and refuses: the CUDA passes only some machines can compile."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# The extensions' names for each (torch's version of CUDA, CUDA_HOME, EFFNET_FAST_CUDA), or the error.
CODE = """
import json, os, sys
import torch, setuptools
from distutils.core import run_setup
found = []
for cuda, home, choice in json.loads(sys.argv[1]):
    torch.version.cuda = cuda
    os.environ.update(CUDA_HOME=home, EFFNET_FAST_CUDA=choice)
    try:
        found.append([extension.name for extension in run_setup("setup.py", stop_after="init").ext_modules])
    except RuntimeError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def extensions(*cases: tuple[str | None, str, str]) -> list[list[str] | str]:
    """What a machine with nothing on PATH builds in each case."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(cases)], cwd=ROOT, env={"PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_cuda_passes_are_built_where_torch_and_a_toolkit_agree(tmp_path: Path) -> None:
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    (tmp_path / "include" / "cuda_runtime_api.h").write_text("#define CUDART_VERSION  13000\n")
    toolkit = str(tmp_path)
    built, *without = extensions(
        ("13.2", toolkit, ""), ("13.2", toolkit, "0"), ("13.2", "", ""), (None, toolkit, ""), ("12.8", toolkit, "")
    )
    assert "effnet_fast._cuda" in built
    for names in without:
        assert set(names) == set(built) - {"effnet_fast._cuda"}
    assert extensions(("13.2", "", "1"), (None, toolkit, "1"), ("12.8", toolkit, "1")) == [
        "EFFNET_FAST_CUDA=1: no CUDA toolkit: nvcc is not on PATH, and CUDA_HOME is not set to one",
        "EFFNET_FAST_CUDA=1: this torch has no CUDA",
        f"EFFNET_FAST_CUDA=1: torch is for CUDA 12.8, the toolkit in {toolkit} is for another",
    ]


def test_an_editable_install_compiles_the_cpu_passes_whose_sources_are_newer(tmp_path: Path) -> None:
    def install() -> dict[str, int]:
        subprocess.run(
            [sys.executable, "setup.py", "editable_wheel", "--dist-dir", "dist"],
            cwd=tmp_path,
            env={**os.environ, "EFFNET_FAST_CUDA": "0"},
            check=True,
            capture_output=True,
        )
        return {path.name.partition(".")[0]: path.stat().st_mtime_ns for path in package.glob("*.so")}

    package, passes = tmp_path / "effnet_fast", tmp_path / "csrc" / "cpu"
    package.mkdir()
    passes.mkdir(parents=True)
    (tmp_path / "csrc" / "bindings").mkdir()
    (tmp_path / "csrc" / "bindings" / "host.cpp").touch()
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    names = {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    for name in names:
        (passes / f"{name}.cpp").touch()
    (passes / "simd.h").touch()

    first = install()
    cpu = {f"_cpu_{name}" for name in names if f"_cpu_{name}" in first}
    assert "_cpu_baseline" in cpu
    assert set(first) == cpu | {"_host"}

    os.utime(passes / "baseline.cpp")
    second = install()
    assert {name for name in cpu if second[name] != first[name]} == {"_cpu_baseline"}

    os.utime(passes / "simd.h")
    third = install()
    assert {name for name in cpu if third[name] != second[name]} == cpu
