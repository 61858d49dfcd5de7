"""The benchmarks' own machinery, and all of them once, in quick mode."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.bench_ops import CASES, OPS
from benchmarks.bench_passes import CONVOLUTIONS, DEPTHWISE, ELEMENTWISE
from benchmarks.harness import COMPILED, LEAN, MIN, OURS, TWIN, Call, check, race
from benchmarks.report import markdown
from effnet_fast.doctor import processor
from effnet_fast.passes.schema import PASSES, PRODUCTS, SWEEPS


class FakeBenchmark:
    """pytest-benchmark's fixture, as far as `race` uses it."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, target: Call, *, setup: Callable[[], None], rounds: int) -> None:
        times = []
        for _ in range(rounds):
            setup()
            start = time.perf_counter()
            target()
            times.append(time.perf_counter() - start)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=times))


def run_race(makes: dict[str, Callable[[int], Call]], **arguments: Any) -> dict[str, Any]:
    benchmark = FakeBenchmark()
    defaults = {"examples": 8, "seconds": 0.5, "tolerance": 1e-6, "table": "T", "row": {"shape": "s"}, "unit": "u/s"}
    race(benchmark, makes, **{**defaults, **arguments})
    return benchmark.extra_info


def test_race_takes_turns_and_counts_examples() -> None:
    order: list[tuple[str, int]] = []

    def make(name: str) -> Callable[[int], Call]:
        def call(n: int) -> list[torch.Tensor]:
            order.append((name, n))
            if name == TWIN:
                time.sleep(0.05 * n)  # 0.4 s for all eight: more than its share
            return [torch.ones(n).sum() / n]

        return lambda n: lambda: call(n)

    info = run_race({OURS: make(OURS), TWIN: make(TWIN), COMPILED: make(COMPILED)}, work=3.0)
    results = info["contestants"]
    assert info["batch"] == results[OURS]["examples"] == 8
    assert results[TWIN]["examples"] == results[COMPILED]["examples"] == 2
    for times in results.values():
        assert times["fastest"] <= times["seconds"] <= times["slowest"]
        assert times["rate"] == pytest.approx(3.0 * times["examples"] / times["seconds"])
    assert results[TWIN]["seconds"] >= 0.1
    timed = order[-9:]  # three rounds, each of all three
    assert timed == [(TWIN, 2), (COMPILED, 2), (OURS, 8)] * 3


@pytest.mark.parametrize("name", [OURS, COMPILED])
def test_race_refuses_another_function(name: str) -> None:
    makes = {key: lambda n: lambda: [torch.ones(n)] for key in (OURS, TWIN, COMPILED)}
    makes[name] = lambda n: lambda: [torch.ones(n) + 1e-3]
    with pytest.raises(AssertionError, match=f"^{name}: result 0 differs"):
        run_race(makes)


def test_check_refuses_nan_and_missing_results() -> None:
    one = torch.ones(2)
    check("x", [one], [one], 0.0)
    with pytest.raises(AssertionError):
        check("x", [one * torch.nan], [one], 0.5)
    with pytest.raises(ValueError, match="zip"):
        check("x", [one], [one, one], 0.5)


def contestant(seconds: float, examples: int = 16) -> dict[str, float]:
    return {"seconds": seconds, "examples": examples, "rate": examples / seconds}


def test_report_of_known_times() -> None:
    rows = [
        {"shape": "a", "contestants": {OURS: contestant(1.0), TWIN: contestant(2.0)}},
        {"shape": "b", "contestants": {OURS: contestant(3.0), TWIN: contestant(3.0, examples=4)}},
    ]
    benchmarks = [
        {"extra_info": {"table": "T", "row": {"op": "o", "shape": row.pop("shape")}, "unit": "u/s", "batch": 16, **row}}
        for row in rows
    ]
    machine = {"effnet_fast": {"processor": "P", "threads": 2, "instruction set": "i", "torch": "t"}}
    lines = list(markdown({"machine_info": machine, "benchmarks": benchmarks}))
    assert lines[0].startswith("On P, 2 threads, i, torch t.")
    assert "| o | a | 16.0 | 8.0 (2.00) |" in lines
    assert "| o | b | 5.3 | 1.3* (4.00) |" in lines
    assert "| o | 3.50 (2.00 to 4.00) |" in lines  # (2 + 12) / (1 + 3) seconds a batch


def test_rows_cover_every_pass_op_and_shape() -> None:
    assert {*ELEMENTWISE, *DEPTHWISE} == set(PASSES)
    assert len(CONVOLUTIONS) == 12
    assert len(CASES) == 12 * (len(OPS) - 1) - 1 + 2  # one block has no section; stem and head


def test_report_in_quick_mode(tmp_path: Path) -> None:
    """Every benchmark runs, at its smallest shape, and finds its implementations to compute the same."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", "--quick", "--no-compile", "--output", tmp_path],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    results = json.loads((tmp_path / "benchmarks.json").read_text())
    rows = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
    assert {row["row"].get("pass") for row in rows} == {None, *PASSES, *PRODUCTS, *SWEEPS}
    assert {row["row"].get("op") for row in rows} == {None, *OPS}
    inference = next(r for r in rows if r["table"] == "B0, inference" and r["row"]["dtype"] == "float32")
    for name, module in (("OpenVINO", "openvino"), ("ONNX Runtime", "onnxruntime")):
        assert (name in inference["contestants"]) == (find_spec(module) is not None)
    training = next(r for r in rows if r["table"] == "B0, training step" and r["row"]["dtype"] == "float32")
    assert 0 < training["kept"][OURS] < training["kept"]["torchvision"]
    text = (tmp_path / "benchmarks.md").read_text()
    assert text in done.stdout
    assert processor() in text.splitlines()[0]
    assert (tmp_path / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


def test_memory_report_of_one_variant_in_quick_mode(tmp_path: Path) -> None:
    def report() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.report", "--memory", "--quick", "--no-compile"]
        command += ["--only", "reference baseline", "--output", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])

    done = report()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    path = tmp_path / "benchmarks.json"
    measured = path.read_text()
    (benchmark,) = json.loads(measured)["benchmarks"]
    row = benchmark["extra_info"]
    assert row["row"] == {"family": "reference", "variant": "baseline", "input": "224 px"}
    assert row["kept"].keys() == row["peak"].keys() == row["contestants"].keys()
    assert row["kept"][MIN] < row["kept"][LEAN] < row["kept"][OURS] < row["kept"][TWIN]
    assert row["largest batch"]["fast"]["8 GB"] < row["largest batch"]["min"]["8 GB"]
    assert (tmp_path / "benchmarks.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["benchmarks.json", "benchmarks.md", "benchmarks.png"]

    text = (tmp_path / "benchmarks.md").read_text()
    again = report()
    assert again.returncode == 0
    assert path.read_text() == measured  # what was there has not been measured again
    assert text in again.stdout

    path.write_text(measured.replace(processor(), "another one"))
    elsewhere = report()
    assert elsewhere.returncode == 2
    assert elsewhere.stderr.splitlines()[-1].startswith(
        f"python -m benchmarks.report: error: --output: {path} is of another machine (another one, "
    )


def test_wrong_options_are_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.report"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--output" in done.stderr
    command += ["--memory", "--only", "b99", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert "error: --only: got 'b99', choose from the words of reference baseline" in done.stderr.splitlines()[-1]
