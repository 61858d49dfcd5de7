"""The plan command: what it prints for people and for programs."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from effnet_fast import create_model, plan, scaling
from effnet_fast.planning import Planner

pytestmark = pytest.mark.usefixtures("stored")

TINY = ["--variant", "tiny", "--resolution", "64"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One variant beside the known ones; without --variant, it and B0 are all there are."""
    for family in scaling.FAMILIES.values():
        monkeypatch.setitem(family.variants, "tiny", scaling.Variant(scaling.Scaling(0.1, 0.5), 0.2, 0.2))
    monkeypatch.setattr(plan, "VARIANTS", ("tiny",))


@pytest.fixture(scope="module")
def planner() -> Planner:
    with torch.device("meta"):
        return Planner(create_model(scaling.Scaling(0.1, 0.5)), 64)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    plan.main([*arguments])
    return capsys.readouterr().out


def test_a_plan_for_programs(capsys: pytest.CaptureFixture[str], planner: Planner) -> None:
    record = json.loads(printed(capsys, *TINY, "--memory", "40MB", "--batch-size", "64", "--json"))
    assert record["peak"] <= 40_000_000 < planner.uniform("fast", 64).peak
    assert record["largest_batch"] == planner.largest_batch(40_000_000) >= 64
    expected = planner.fastest(64, 40_000_000)
    assert record["policies"] == list(expected.policies)
    assert record["segments"] == [list(segment) for segment in expected.segments]
    assert (record["batch_size"], record["input_size"], record["amp"]) == (64, 64, "bf16")


def test_a_plan_for_people(capsys: pytest.CaptureFixture[str], planner: Planner) -> None:
    budget = planner.uniform("min", 64).peak
    lines = printed(capsys, *TINY, "--memory", f"{budget / 1e6 / 0.97:.1f}MB", "--batch-size", "64").splitlines()
    assert lines[0].startswith("tiny, batch 64 at 64 px, bf16, cpu: needs ")
    policies = {line.split()[0]: line.split() for line in lines if line.split()[:1] in (["fast"], ["lean"], ["min"])}
    for policy, (_, amount, unit, time, largest) in policies.items():
        assert unit == "MB"
        assert float(amount) == pytest.approx(planner.uniform(policy, 64).peak / 1e6, abs=0.06)
        assert time == f"{planner.uniform(policy, 64).extra_time:+.0%}"
        assert int(largest) > 0
    assert policies.keys() == {"fast", "lean", "min"}
    assert any(line.startswith("  stem") for line in lines)
    assert any("head " in line for line in lines)


def test_without_a_batch_size_the_largest(capsys: pytest.CaptureFixture[str], planner: Planner) -> None:
    record = json.loads(printed(capsys, *TINY, "--memory", "40MB", "--json"))
    assert record["batch_size"] == record["largest_batch"] == planner.largest_batch(40_000_000)
    assert record["segments"]  # at the limit


@pytest.mark.parametrize("budget", [None, 40_000_000])
def test_a_table_of_all_variants(capsys: pytest.CaptureFixture[str], planner: Planner, budget: int | None) -> None:
    arguments = ["--resolution", "64"] + ([] if budget is None else ["--memory", "40MB"])
    records = json.loads(printed(capsys, *arguments, "--json"))
    assert [record["batch_size"] for record in records] == list(plan.BATCHES)
    for record in records:
        fits = budget is None or planner.least(record["batch_size"]) <= budget
        assert (record["peak"] is not None) == fits
        assert record["least"] == planner.least(record["batch_size"])
    cells = printed(capsys, *arguments).splitlines()[-1].split()
    assert cells[:2] == ["tiny", "64"]
    assert cells.count("-") == sum(record["peak"] is None for record in records)


def test_a_plot_of_memory_against_time(tmp_path: Path) -> None:
    plan.main([*TINY, "--batch-size", "64", "--plot", str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_less_memory_takes_more_time(planner: Planner) -> None:
    curve = plan.frontier(planner, 64)
    assert curve[-1].extra_time == 0
    assert curve[0].extra_time > 0.1
    for less, more in pairwise(curve):
        assert less.extra_time >= more.extra_time - 0.01  # equal but for the search's levels


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--variant", "b9"], "choose from 'tiny'"),
        (["--memory", "min"], "--memory: got 'min', must be an amount as 8GB or 7.5GiB"),
        (["--batch-size", "0"], "--batch-size: got '0', must be an integer of at least 1"),
        (["--plot", "x.png"], "--plot: needs --variant"),
        ([*TINY, "--memory", "11MB", "--batch-size", "64"], "--memory: got 11.0 MB, a step of batch 64 at 64 px needs"),
    ],
)
def test_wrong_options_get_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        plan.main(arguments)
    assert error.value.code == 2
    lines: Any = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert expected in lines[0]
