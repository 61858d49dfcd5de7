"""Tuning the tiles, with a clock that is not one, and what becomes of the file it leaves."""

import json
import logging
from pathlib import Path

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

from benchmarks.gpu_triton import launches
from effnet_fast.passes.triton import configs, tune
from effnet_fast.passes.triton.configs import TABLES, Config

TUNED = {"dwconv_stats": {(3, 1, 2): Config(8, 64, 4, 8)}, "backward_dwconv": {(5, 2, 4): Config(32, 32, 1, 8)}}


def test_the_fastest_that_runs_is_chosen() -> None:
    asked = []

    def measure(name: str, kernel: int, stride: int, size: int, config: Config) -> float:
        asked.append((name, kernel, stride, size, config))
        if config.warps == 4:
            raise OutOfResources(2, 1, "shared memory")
        return 10 * abs(config.columns - kernel // 2) + config.channels / 32 + 1 / config.lanes

    tuned = tune.tune(measure)
    assert {name: set(table) for name, table in tuned.items()} == {name: set(table) for name, table in TABLES.items()}
    for name, table in tuned.items():
        for key, config in table.items():
            assert config.warps == 8
            assert config.channels == 32
            assert config.columns == (1 if name == "backward_dwconv" else key[0] // 2)
            # what is shipped has been tried as well
            assert (name, *key, TABLES[name][key]) in asked
    assert len(set(asked)) == len(asked)
    assert all(configs._is_config(list(config)) for *_, config in asked)


def test_what_can_not_run_at_all_is_left_as_shipped() -> None:
    def measure(*_: object) -> float:
        raise OutOfResources(2, 1, "shared memory")

    assert tune.tune(measure) == {name: {} for name in TABLES}


@pytest.mark.parametrize("name", TABLES)
def test_the_kernel_itself_is_timed(name: str) -> None:
    call = tune.sample_call(name, 5, 2, 2, torch.device("meta"))
    assert launches(call)[0].kernel.__name__ == f"{name}_kernel"


def test_results_are_used_from_then_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    configs.write_tuned(configs.tuned_file(), "GPU A", {"dwconv_stats": {}})
    configs.write_tuned(configs.tuned_file(), "GPU A", TUNED)
    assert [path.name for path in configs.tuned_file().parent.iterdir()] == ["triton.json"]
    configs.tables_of.cache_clear()
    try:
        tables = configs.tables_of("GPU A")
        for name, table in TABLES.items():
            assert tables[name] == {**table, **TUNED.get(name, {})}
        assert configs.tables_of("GPU B") == TABLES
    finally:
        configs.tables_of.cache_clear()


def test_without_a_file_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert configs.read_tuned(tmp_path / "none.json", "GPU A") == {}
    assert caplog.records == []


GOOD = {"device": "GPU A", "triton": triton.__version__, "configurations": [["dwconv_stats", 3, 1, 2, [8, 64, 4, 8]]]}


def with_row(*row: object) -> str:
    return json.dumps({**GOOD, "configurations": [row]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({**GOOD, "device": "GPU B"}), "for GPU B and Triton"),
        (json.dumps({**GOOD, "triton": "1.0"}), "for GPU A and Triton 1.0"),
        ("", "damaged"),
        (json.dumps(GOOD)[:-9], "damaged"),
        ("[" * 100_000, "damaged"),
        ("[]", "damaged"),
        ("7", "damaged"),
        (json.dumps({"device": "GPU A"}), "damaged"),
        (with_row("no_such_pass", 3, 1, 2, [8, 64, 4, 8]), "damaged"),
        (with_row("dwconv_stats", 4, 1, 2, [8, 64, 4, 8]), "damaged"),
        (with_row("dwconv_stats", [3], 1, 2, [8, 64, 4, 8]), "damaged"),
        (with_row("dwconv_stats", 3, 1, 2, [8, 64, 4]), "damaged"),
        (with_row("dwconv_stats", 3, 1, 2, [8, 48, 4, 8]), "damaged"),
        (with_row("dwconv_stats", 3, 1, 2, [8, 64, -1, 8]), "damaged"),
        (with_row("dwconv_stats", 3, 1, 2, [8, 64, 1e9, 8]), "damaged"),
        (with_row("dwconv_stats", 3, 1, 2, [2**40, 64, 1, 8]), "damaged"),
        (with_row("dwconv_stats", 3, 1, 2, "__import__('os')"), "damaged"),
    ],
)
def test_a_file_of_others_or_a_damaged_one_is_left_alone(
    text: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "triton.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING, "effnet_fast"):
        assert configs.read_tuned(path, "GPU A") == {}
    (record,) = caplog.records
    assert message in record.getMessage()
    assert str(path) in record.getMessage()


def test_the_command_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tune"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU to tune on"):
        tune.main()
