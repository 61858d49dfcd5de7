import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from effnet_fast import doctor
from effnet_fast.passes import backend
from effnet_fast.passes.backend import current, passes_for, resolve, use_backend, why_not
from effnet_fast.passes.schema import ALGEBRA, BLOCKS, PASSES, PRODUCTS

X = torch.zeros(1, 8, 2, 2)


def test_auto_takes_the_compiled_passes_and_falls_back_with_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve(X) == "cpu"
    backend._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "effnet_fast"):
        for _ in range(3):
            assert resolve(X, kernel=9) == "eager"
    assert [record.getMessage() for record in caplog.records] == [
        "falling back to eager PyTorch: the kernel is 9, must be 3, 5 or 7"
    ]


@pytest.mark.parametrize("x", [X, X.double()], ids=["native", "fallback"])
def test_the_choice_compiles_without_graph_breaks(x: torch.Tensor, caplog: pytest.LogCaptureFixture) -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        fallback = resolve(x) == "eager"
        mean, _ = passes_for(x).channel_stats(x)
        return -mean if fallback else mean

    torch.compiler.reset()
    backend._warn_once.cache_clear()
    x = torch.arange(x.numel(), dtype=x.dtype).view(1, 2, 2, 8).permute(0, 3, 1, 2)
    with caplog.at_level(logging.WARNING, "effnet_fast"):
        out = torch.compile(forward, fullgraph=True, backend="eager")(x)
    assert torch.equal(out, forward(x))
    assert len(caplog.records) == (x.dtype is torch.float64)


@pytest.mark.parametrize(
    ("x", "kernel", "stride", "reason"),
    [
        (X.double(), 3, 1, "dtype is torch.float64"),
        (X[:, :7], 3, 1, "7 channels"),
        (X, 4, 1, "kernel is 4"),
        (X, 3, 3, "stride is 3"),
        (X.to("meta"), 3, 1, "x is on meta"),
    ],
)
def test_one_predicate_chooses_and_explains(x: torch.Tensor, kernel: int, stride: int, reason: str) -> None:
    assert reason in (why_not("cpu", x, kernel, stride) or "")
    assert resolve(x, kernel, stride) == "eager"
    with use_backend("cpu"), pytest.raises(RuntimeError, match=reason):
        resolve(x, kernel, stride)


@dataclass
class OnGpu:
    """What the choice of a backend looks at, of a tensor on a GPU."""

    device = torch.device("cuda", 0)
    dtype: torch.dtype = torch.bfloat16
    shape: tuple[int, ...] = (1, 9, 2, 2)


@pytest.mark.parametrize(
    ("cuda", "triton", "expected"),
    [
        (None, None, "cuda"),
        ("the CUDA passes were not built", None, "triton"),
        ("the CUDA passes were not built", "triton does not load", "eager"),
    ],
)
def test_a_gpu_prefers_cuda_then_triton_then_eager(cuda, triton, expected, monkeypatch, caplog) -> None:
    monkeypatch.setattr(backend, "_unavailable_on", lambda name, index: {"cuda": cuda, "triton": triton}[name])
    monkeypatch.setattr(backend, "_PASSES", SimpleNamespace(cpu="cpu", cuda="cuda", triton="triton", reference="eager"))
    backend._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "effnet_fast"):
        assert resolve(OnGpu()) == expected
    assert [r.getMessage() for r in caplog.records] == {
        "cuda": [],
        "triton": ["falling back to triton: the CUDA passes were not built"],
        "eager": ["falling back to eager PyTorch: the CUDA passes were not built; triton does not load"],
    }[expected]
    assert passes_for(OnGpu()) == expected
    assert resolve(OnGpu(torch.float64)) == "eager"
    for name, reason in (("cuda", cuda), ("triton", triton)):
        with use_backend(name):
            if reason is None:
                assert resolve(OnGpu()) == name
                assert passes_for(OnGpu()) == name
            else:
                with pytest.raises(RuntimeError, match=f"backend: '{name}' can't run this call: {reason}"):
                    resolve(OnGpu())
            with pytest.raises(RuntimeError, match=f"backend: '{name}' can't run this call: x is on cpu"):
                resolve(X)
            assert passes_for(X) == "cpu"


def test_an_older_gpu_than_the_passes_were_built_for_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(backend, "why_unavailable", lambda name: None)
    monkeypatch.setitem(sys.modules, "effnet_fast._cuda", SimpleNamespace(lowest_capability=80))
    for capability, reason in ((7, 5), "capability 7.5, the CUDA passes were built for 8.0"), ((8, 0), None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, capability=capability: capability)
        given = why_not("cuda", OnGpu())
        assert given is None if reason is None else reason in given


def test_every_backend_has_all_passes_products_and_algebra_or_lacks_blocks() -> None:
    assert backend.why_unavailable("triton") is None
    for name in PASSES + PRODUCTS + ALGEBRA + BLOCKS:
        assert all(hasattr(getattr(backend._PASSES, of), name) for of in ("cpu", "cuda", "triton", "reference"))


def test_choice_nests_and_ends_with_its_block() -> None:
    assert current() == "auto"
    with use_backend("eager"):
        assert resolve(X) == "eager"
        with use_backend("cpu"):
            assert resolve(X) == "cpu"
        assert current() == "eager"
    assert current() == "auto"
    with (
        pytest.raises(ValueError, match="backend: got 'tpu', choose from auto, eager, cpu, cuda, triton"),
        use_backend("tpu"),
    ):
        pass


def run(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "effnet_fast.doctor"], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_doctor_says_what_runs_here_and_why_not() -> None:
    facts = dict(line.split("  ", 1) for line in run({}).stdout.splitlines())
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    assert facts["cpu passes, baseline"] == "built, runs here"
    assert facts["float32 on the CPU"] == "compiled passes"
    assert "float64" in facts["float64 on the CPU"]
    assert facts["backend"] == "auto"
    assert facts["CUDA passes"].startswith(("built", "the CUDA passes were not built: "))
    baseline = run({"EFFNET_FAST_ISA": "baseline", "EFFNET_FAST_BACKEND": "eager"}).stdout
    assert "instruction set in use  baseline" in baseline
    assert "eager\n" in baseline


@pytest.mark.parametrize(
    ("cuda", "home", "missing"),
    [
        (None, None, "this torch has no CUDA"),
        ("13.0", None, "no nvcc on PATH, and CUDA_HOME is not set"),
        ("13.0", "/usr/local/cuda", "install again with EFFNET_FAST_CUDA=1 to see why"),
    ],
)
def test_doctor_says_what_the_cuda_passes_lack(
    cuda: str | None, home: str | None, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "why_unavailable", lambda backend: f"the {backend} passes were not built")
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    if home:
        monkeypatch.setenv("CUDA_HOME", home)
    assert dict(doctor.report())["CUDA passes"] == f"the cuda passes were not built: {missing}"


@pytest.mark.parametrize("variable", ["EFFNET_FAST_ISA", "EFFNET_FAST_BACKEND"])
def test_wrong_environment_gets_one_line(variable: str) -> None:
    done = run({variable: "mmx"})
    assert done.returncode == 2
    assert done.stderr.startswith(f"python -m effnet_fast.doctor: error: {variable}: got 'mmx'")
    assert len(done.stderr.splitlines()) == 1
