"""Training in several processes, as torchrun starts them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from effnet_fast.run_folder import read_checkpoint
from effnet_fast.trainer import Trainer
from tests.test_resume import kill_at_write, limit_file_size
from tests.tiny import SMALL, assert_same_bits, finish, results, start, tiny_variant, wait_for


def start_group(
    count: int,
    log: Path,
    *arguments: str,
    prepare: Callable[[], None] | None = None,
    only: int | None = None,
) -> list[BaseProcess]:
    """One process for each rank, with the variables that torchrun sets. prepare: of all, or of `only` one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        start(
            *arguments,
            log=Path(f"{log}.{rank}"),
            environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            prepare=prepare if only in (None, rank) else None,
        )
        for rank in range(count)
    ]


def train(count: int, folder: Path, *arguments: str) -> None:
    group = start_group(count, Path(f"{folder}.log"), *SMALL, "--output", str(folder), *arguments)
    statuses = [finish(process) for process in group]
    assert statuses == [0] * count, Path(f"{folder}.log.0").read_text()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "run"
    train(2, folder, "--checkpoint-minutes", "0")
    return folder


def test_the_run_is_one_run(two_processes: Path) -> None:
    state, metrics = results(two_processes)
    assert [row["epoch"] for row in metrics] == [0, 1]
    assert (state["epoch"], state["config"]["processes"], state["config"]["batch_size"]) == (2, 2, 8)
    assert state["config"]["lr"] == 0.256 * 16 / 256  # of both batches together
    # Shards of the validation are added up: 40 images make quarters of ten per cent.
    assert all((row["val_top1"] / 2.5).is_integer() for row in metrics)
    first, second = state["rng"]["torch"]
    assert not torch.equal(first, second)
    # Process 0 alone speaks.
    assert "in each of 2 processes" in Path(f"{two_processes}.log.0").read_text()
    assert Path(f"{two_processes}.log.1").read_text() == ""


def test_validation_counts_every_example_once(two_processes: Path, tmp_path: Path) -> None:
    """The weights of both processes, evaluated by one."""
    from effnet_fast.evaluate import main

    with tiny_variant(), pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        main([str(two_processes), "--checkpoint", "latest"])
    row = results(two_processes)[1][-1]
    figures = {line.split()[0]: line.split()[-2:] for line in lines[2:]}
    assert int(lines[2].split()[1]) == 40
    assert [float(value) for value in figures["top-1"]] == pytest.approx([row["val_top1"], row["ema_top1"]], abs=1e-4)
    assert float(figures["loss"][0]) == pytest.approx(row["val_loss"], abs=1e-4)  # printed to four decimals


def test_killed_and_resumed_ends_with_the_same_bits(two_processes: Path, tmp_path: Path) -> None:
    """Process 0 is killed while it writes; the other one ends with an error, not a hang."""
    folder = tmp_path / "run"
    options = [*SMALL, "--output", str(folder), "--checkpoint-minutes", "0", "--resume", "auto"]
    killed = start_group(2, tmp_path / "log", *options, prepare=partial(kill_at_write, 12), only=0)
    assert finish(killed[0]) == -signal.SIGKILL
    assert finish(killed[1]) == 1
    line = (tmp_path / "log.1").read_text().splitlines()[-1]
    assert line.endswith("error: another process of this run ended; go on with --resume auto")
    assert "Traceback" not in (tmp_path / "log.1").read_text()
    assert 0 < read_checkpoint(folder / "checkpoint.pt")["step"] < 4
    train(2, folder, "--checkpoint-minutes", "0", "--resume", "auto")
    (state, metrics), (expected, expected_metrics) = results(folder), results(two_processes)
    assert metrics == expected_metrics
    assert_same_bits(state, expected)
    # With another number of processes it would be another run.
    alone = start(*options, log=tmp_path / "log")
    assert finish(alone) == 2
    assert "--processes: got 1, the run in" in (tmp_path / "log").read_text()


def test_an_error_of_one_ends_the_others(tmp_path: Path) -> None:
    """A full disk, which only the process that writes notices."""
    log, full = tmp_path / "log", partial(limit_file_size, 1_000_000)
    options = [*SMALL, "--output", str(tmp_path / "run"), "--checkpoint-minutes", "0"]
    group = start_group(2, log, *options, prepare=full, only=0)
    assert [finish(process) for process in group] == [2, 1]
    lines = [Path(f"{log}.{rank}").read_text().splitlines()[-1].rpartition("\r")[2] for rank in range(2)]
    assert "checkpoint.pt: can't be written: File too large" in lines[0]
    assert "another process of this run ended" in lines[1]


def kill_at_step(count: int) -> None:
    """Have this process killed before its count-th step of training."""
    left, step = [count], Trainer.train_step

    def killing(*args: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        step(*args)

    Trainer.train_step = killing


def test_four_processes_of_which_one_is_killed(tmp_path: Path) -> None:
    """One that does not write: the others end with an error, and all go on to the bits of a run that was left alone."""
    options = ("--batch-size", "2", "--checkpoint-minutes", "0")
    train(4, tmp_path / "whole", *options)
    folder, log = tmp_path / "run", tmp_path / "log"
    options = (*options, "--resume", "auto")
    # The eleventh of sixteen steps, the third of the second epoch.
    group = start_group(4, log, *SMALL, "--output", str(folder), *options, prepare=partial(kill_at_step, 11), only=2)
    assert [finish(process) for process in group] == [1, 1, -signal.SIGKILL, 1], Path(f"{log}.0").read_text()
    for rank in (0, 1, 3):
        text = Path(f"{log}.{rank}").read_text()
        assert text.endswith("error: another process of this run ended; go on with --resume auto\n")
        assert "Traceback" not in text
    state = read_checkpoint(folder / "checkpoint.pt")
    assert (state["epoch"], state["step"]) == (1, 2)
    train(4, folder, *options)
    (state, metrics), (expected, expected_metrics) = results(folder), results(tmp_path / "whole")
    assert metrics == expected_metrics
    assert_same_bits(state["rng"], expected["rng"])
    assert_same_bits(state["model"], expected["model"])
    assert_same_bits(state["ema"], expected["ema"])


def test_all_stop_after_the_same_step_when_one_is_signalled(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    group = start_group(4, log, *SMALL, "--batch-size", "2", "--epochs", "50", "--output", str(folder))
    wait_for(lambda: (folder / "config.json").exists())
    time.sleep(1)
    os.kill(group[2].pid, signal.SIGTERM)
    assert [finish(process) for process in group] == [143] * 4, Path(f"{log}.0").read_text()
    state = read_checkpoint(folder / "checkpoint.pt")
    assert len(state["rng"]["torch"]) == 4
    assert state["epoch"] < 50


@pytest.mark.slow
def test_torchrun_restarts_all_when_one_is_killed(two_processes: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--standalone", "-m", "tests.tiny", *SMALL, "--output", str(folder)]
    command += ["--checkpoint-minutes", "0", "--resume", "auto"]
    with open(log, "w") as file:
        agent = subprocess.Popen(command, stdout=file, stderr=file)
    wait_for(lambda: (folder / "checkpoint.pt").exists())
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    try:
        assert agent.wait(300) == 0, log.read_text()
    finally:
        agent.terminate()  # and with it the processes that it started
    (state, metrics), (expected, expected_metrics) = results(folder), results(two_processes)
    assert metrics == expected_metrics
    assert_same_bits(state["model"], expected["model"])
