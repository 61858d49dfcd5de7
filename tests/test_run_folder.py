import pickle
from pathlib import Path

import pytest
import torch

from effnet_fast.run_folder import RunError, RunFolder, write_atomic


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", {"variant": "b0"})


STATE = {"epoch": 3, "model": {"w": torch.arange(4.0)}, "ema": {"w": torch.zeros(4)}}


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoints_round_trip_and_best_stays(run: RunFolder) -> None:
    run.save_checkpoint(STATE, best=True)
    run.save_checkpoint(STATE | {"epoch": 4}, best=False)
    assert run.load_checkpoint("best")["epoch"] == 3
    latest = run.load_checkpoint("latest")
    assert latest["epoch"] == 4
    torch.testing.assert_close(latest["model"]["w"], STATE["model"]["w"])


def test_metrics_append(run: RunFolder) -> None:
    run.append_metrics({"epoch": 0, "lr": 0.5})
    run.append_metrics({"epoch": 1, "lr": 0.25})
    assert run.metrics() == [{"epoch": 0, "lr": 0.5}, {"epoch": 1, "lr": 0.25}]


def test_an_existing_run_is_not_overwritten(run: RunFolder) -> None:
    with pytest.raises(RunError, match="already holds a run"):
        RunFolder.create(run.path, {})
    assert run.config() == {"variant": "b0"}


def test_missing_and_foreign_configurations_get_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"config\.json: No such file"):
        RunFolder(tmp_path).config()
    for content in (b"{", b"[]", b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(RunError, match=r"config\.json: not a") as error:
            RunFolder(tmp_path).config()
        assert "\n" not in str(error.value)


class _Payload:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_bad_checkpoints_get_one_line_and_execute_nothing(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.path)
    path = run.path / "checkpoint.pt"
    with pytest.raises(RunError, match="No such file"):
        run.load_checkpoint("latest")
    run.save_checkpoint(STATE, best=False)
    good = path.read_bytes()
    malicious = pickle.dumps(_Payload())
    for content in (b"", b"not a checkpoint", good[: len(good) // 2], good[:-1], malicious):
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"checkpoint\.pt") as error:
            run.load_checkpoint("latest")
        assert "\n" not in str(error.value)
    torch.save({"epoch": _Payload(), "model": {}, "ema": {}}, path)
    with pytest.raises(RunError, match=r"checkpoint\.pt"):
        run.load_checkpoint("latest")
    torch.save([1, 2], path)
    with pytest.raises(RunError, match="not a checkpoint"):
        run.load_checkpoint("latest")
    assert not (run.path / "executed").exists()
