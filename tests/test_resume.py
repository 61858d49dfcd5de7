"""Runs that are killed, stopped or starved of disk, and resumed: in processes of their own."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.summary.writer.record_writer import RecordWriter

from effnet_fast import train
from effnet_fast.run_folder import RunError, read_checkpoint
from effnet_fast.trainer import Trainer
from tests.tiny import SMALL, assert_same_bits, finish, results, start, wait_for

EVERY_STEP = ["--checkpoint-minutes", "0"]


def arguments(folder: Path, *more: str) -> list[str]:
    return [*SMALL, *EVERY_STEP, "--output", str(folder), "--resume", "auto", *more]


def assert_ends_like(uninterrupted: Path, folder: Path) -> None:
    (state, metrics), (expected, expected_metrics) = results(folder), results(uninterrupted)
    assert metrics == expected_metrics
    assert_same_bits(state, expected)
    assert_same_bits(read_checkpoint(folder / "best.pt"), read_checkpoint(uninterrupted / "best.pt"))
    assert not list(folder.glob(".*"))  # nothing half-written is left


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert finish(start(*arguments(folder), log=folder.with_suffix(".log"))) == 0
    return folder


def kill_at_random(folder: Path, kills: int, seed: int, *more: str) -> None:
    """A run that is killed so many times, each time somewhere between its start and a second of training."""
    rng = random.Random(seed)
    log = folder.with_suffix(".log")
    while kills > 0:
        process = start(*arguments(folder, *more), log=log)
        # The command says that it trains when everything is loaded.
        while process.exitcode is None and not (log.exists() and "Training" in log.read_text()):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1))
        if process.exitcode is None:
            process.kill()
            kills -= 1
        finish(process)
        log.unlink()
        if process.exitcode == 0:
            shutil.rmtree(folder)
    assert finish(start(*arguments(folder, *more), log=log)) == 0, log.read_text()


def test_killed_at_random_moments(uninterrupted: Path, tmp_path: Path) -> None:
    kill_at_random(tmp_path / "run", 20, seed=0)
    assert_ends_like(uninterrupted, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_killed_at_many_random_moments(uninterrupted: Path, tmp_path: Path, seed: int) -> None:
    kill_at_random(tmp_path / "run", 20, seed)
    assert_ends_like(uninterrupted, tmp_path / "run")


def kill_at_write(count: int) -> None:
    """Have this process killed before its count-th call of a function that decides what a crash leaves on disk."""
    left = [count]

    def killing(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "link"):
        setattr(os, name, killing(getattr(os, name)))


def die_at_write(folder: Path, count: int) -> None:
    process = start(*arguments(folder), log=folder.with_suffix(".log"), prepare=partial(kill_at_write, count))
    assert finish(process) == -signal.SIGKILL


# 1 to 3 write the configuration, 4 to 48 eight checkpoints, 49 the metrics, 50 to 58 the checkpoint of the epoch.
@pytest.mark.parametrize("count", [2, 5, 11, 50, 55, 57])
def test_killed_while_writing(uninterrupted: Path, tmp_path: Path, count: int) -> None:
    die_at_write(tmp_path / "run", count)
    assert finish(start(*arguments(tmp_path / "run"), log=tmp_path / "log")) == 0
    assert_ends_like(uninterrupted, tmp_path / "run")


def test_killed_with_all_of_the_recipe(tmp_path: Path) -> None:
    recipe = ["--optimizer", "adamw", "--schedule", "cosine", "--accumulate", "3", "--mixup", "0.2", "--cutmix", "1"]
    recipe += ["--randaugment", "5", "--freeze", "stem", "--ema-decay", "0.9", "--no-ema-warmup", "--clip-grad", "1"]
    recipe += ["--label-smoothing", "0.2", "--weight-decay", "0.01"]
    runs = [tmp_path / "whole", tmp_path / "killed"]
    assert finish(start(*arguments(runs[0], *recipe), log=tmp_path / "log")) == 0
    killed = start(*arguments(runs[1], *recipe), log=tmp_path / "log", prepare=partial(kill_at_write, 12))
    assert finish(killed) == -signal.SIGKILL
    assert 0 < read_checkpoint(runs[1] / "checkpoint.pt")["step"] < 8
    assert finish(start(*arguments(runs[1], *recipe), log=tmp_path / "log")) == 0
    assert_ends_like(*runs)


@pytest.mark.slow
@pytest.mark.parametrize("count", range(1, 80))
def test_killed_at_every_write_of_an_epoch(uninterrupted: Path, tmp_path: Path, count: int) -> None:
    test_killed_while_writing(uninterrupted, tmp_path, count)


def in_a_slow_group() -> None:
    """A process group of its own, and steps that are slow and tell when they are done."""
    os.setpgrp()
    step = Trainer.train_step

    def slow_step(*args: Any) -> None:
        step(*args)
        print("a step", flush=True)
        time.sleep(0.2)

    Trainer.train_step = slow_step


@pytest.mark.parametrize(
    ("number", "status", "augment"),
    [(signal.SIGTERM, 143, "fast"), (signal.SIGINT, 130, "fast"), (signal.SIGTERM, 143, "reference")],
)
def test_signals_end_a_run_after_its_step(
    uninterrupted: Path, tmp_path: Path, number: signal.Signals, status: int, augment: str
) -> None:
    """To the whole process group, as a terminal and supervisors send it: `reference` has worker processes in it."""
    folder, log = tmp_path / "run", tmp_path / "log"
    options = [*arguments(folder), "--checkpoint-minutes", "60", "--augment", augment]
    process = start(*options, log=log, prepare=in_a_slow_group)
    wait_for(lambda: log.exists() and "a step" in log.read_text())
    os.killpg(process.pid, number)
    assert finish(process) == status
    assert log.read_text().splitlines()[-1] == (
        f"python -m effnet_fast.train: stopped by {number.name}; go on with --resume auto --output {folder}"
    )
    state = read_checkpoint(folder / "checkpoint.pt")
    assert state["epoch"] == 0
    assert 1 <= state["step"] < 8
    if augment == "fast":
        assert finish(start(*arguments(folder), log=log)) == 0
        state, metrics = results(folder)
        expected, expected_metrics = results(uninterrupted)
        assert metrics == expected_metrics
        assert_same_bits(state["model"], expected["model"])


def interrupt_early() -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    train.load_dataset = load_dataset


def test_interrupted_before_training(tmp_path: Path) -> None:
    assert finish(start(*arguments(tmp_path / "run"), log=tmp_path / "log", prepare=interrupt_early)) == 130
    assert (tmp_path / "log").read_text() == "python -m effnet_fast.train: stopped by SIGINT before it could save\n"


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def last_lines(log: Path) -> list[str]:
    """What a run wrote after its progress bars."""
    return [line.rpartition("\r")[2] for line in log.read_text().splitlines()]


def test_full_disk(uninterrupted: Path, tmp_path: Path) -> None:
    """A limit on the size of files: writing a checkpoint fails halfway, as on a full disk."""
    folder, log = tmp_path / "run", tmp_path / "log"
    # Killed after its first checkpoint, then no room for a second one.
    die_at_write(folder, 6)
    good = (folder / "checkpoint.pt").read_bytes()
    process = start(*arguments(folder), log=log, prepare=partial(limit_file_size, 1_000_000))
    assert finish(process) not in (0, -signal.SIGXFSZ)
    line = last_lines(log)[-1]
    assert line.endswith(f"{folder / 'checkpoint.pt'}: can't be written: File too large; the checkpoint before is kept")
    assert "Traceback" not in log.read_text()
    assert (folder / "checkpoint.pt").read_bytes() == good
    assert finish(start(*arguments(folder), log=log)) == 0
    assert_ends_like(uninterrupted, folder)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (500, "--output: can't write to {}: File too large"),
        (1_000_000, "{}/checkpoint.pt: can't be written: File too large; there is none before it"),
    ],
)
def test_full_disk_from_the_beginning(uninterrupted: Path, tmp_path: Path, size: int, message: str) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    process = start(*arguments(folder), log=log, prepare=partial(limit_file_size, size))
    assert finish(process) == 2
    assert last_lines(log)[-1] == f"python -m effnet_fast.train: error: {message.format(folder)}"
    assert "Traceback" not in log.read_text()
    assert finish(start(*arguments(folder), log=log)) == 0
    assert_ends_like(uninterrupted, folder)


def no_room_for_events() -> None:
    def write(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    RecordWriter.write = write


def test_full_disk_for_tensorboard(tmp_path: Path) -> None:
    """It writes in a thread of its own."""
    folder, log = tmp_path / "run", tmp_path / "log"
    assert finish(start(*arguments(folder), log=log, prepare=no_room_for_events)) == 2
    assert last_lines(log)[1:] == [f"python -m effnet_fast.train: error: {folder}: No space left on device"]


def test_damaged_metrics_get_one_line(uninterrupted: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(uninterrupted, folder)
    path = folder / "metrics.jsonl"
    path.write_bytes(bytes(100) + path.read_bytes())
    assert finish(start(*arguments(folder, "--epochs", "3"), log=log)) == 2
    assert last_lines(log)[-1].endswith(f"error: {path}: damaged, a line of it is not JSON")


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "text", "foreign", "of another run"])
def test_auto_takes_the_newest_good_checkpoint(uninterrupted: Path, tmp_path: Path, damage: str) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(uninterrupted, folder)
    path = folder / "checkpoint.pt"
    raw = path.read_bytes()
    state = read_checkpoint(path)
    path.unlink()  # best.pt may be the same file
    if damage == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "flipped bit":
        path.write_bytes(raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :])
    elif damage == "text":
        path.write_text("not a checkpoint\n")
    elif damage == "foreign":
        torch.save({"state_dict": {}}, path)
    else:
        torch.save(state | {"config": state["config"] | {"seed": 1}}, path)
    assert finish(start(*arguments(folder), log=log)) == 0
    assert sum(line.startswith(f"{path}: ") and line.endswith("; left out") for line in last_lines(log)) == 1
    assert "Going on after 1 epochs and 8 steps" in log.read_text()
    assert_ends_like(uninterrupted, folder)


def test_auto_without_any_good_checkpoint_gets_one_line(uninterrupted: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(uninterrupted, folder)
    for path in folder.glob("*.pt"):
        path.unlink()
        path.write_bytes(b"")
    assert finish(start(*arguments(folder), log=log)) == 2
    assert "no checkpoint in it is good" in last_lines(log)[-1]
    assert "Traceback" not in log.read_text()


def test_one_checkpoint_by_name(uninterrupted: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(uninterrupted, folder)
    # All other options are the run's own.
    assert finish(start("--resume", str(folder / "checkpoint-1.pt"), log=log)) == 0
    assert_ends_like(uninterrupted, folder)
    (folder / "checkpoint-1.pt").write_bytes(b"x")
    for options, message in (
        (["--resume", str(folder / "checkpoint-1.pt")], "checkpoint-1.pt: damaged"),
        (["--resume", str(folder / "nowhere.pt")], "nowhere.pt: No such file"),
        (["--resume", str(folder / "checkpoint.pt"), "--output", str(tmp_path)], "--output"),
        (["--resume", str(folder / "checkpoint.pt"), "--batch-size", "4"], "--batch-size: got 4, the run in"),
        (["--resume", "auto"], "needs --output"),
    ):
        assert finish(start(*options, log=log)) == 2
        assert message in log.read_text()
        assert len(log.read_text().splitlines()) == 1


def test_a_run_can_be_made_longer(uninterrupted: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(uninterrupted, folder)
    assert finish(start(*arguments(folder, "--epochs", "3"), log=log)) == 0
    _, metrics = results(folder)
    assert metrics[:2] == results(uninterrupted)[1]
    assert [row["epoch"] for row in metrics] == [0, 1, 2]
    assert json.loads((folder / "config.json").read_text())["epochs"] == 3


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = tmp_path / "log"
    assert finish(start(*arguments(tmp_path / "file" / "run"), log=log)) == 2
    assert len(log.read_text().splitlines()) == 1
    assert f"can't write to {tmp_path / 'file' / 'run'}: Not a directory" in log.read_text()


def mutated(raw: bytes, rng: random.Random) -> bytes:
    content = bytearray(raw)
    place, length = rng.randrange(len(raw)), rng.choice([1, 8, 1000, len(raw) // 3])
    match rng.choice(["flip", "flip", "flip", "cut", "zero", "insert", "remove", "double", "head", "tail"]):
        case "flip":
            for _ in range(rng.choice([1, 1, 10])):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case "cut":
            del content[place:]
        case "zero":
            content[place : place + length] = bytes(len(content[place : place + length]))
        case "insert":
            content[place:place] = rng.randbytes(length)
        case "remove":
            del content[place : place + length]
        case "double":
            content += raw
        case "head":  # the first member's header and the pickle
            content[rng.randrange(min(2000, len(content)))] = rng.randrange(256)
        case "tail":  # the archive's directory
            content[-1 - rng.randrange(min(2000, len(content)))] = rng.randrange(256)
    return bytes(content)


def test_mutated_checkpoints_are_refused_or_read(uninterrupted: Path, tmp_path: Path) -> None:
    raw = (uninterrupted / "checkpoint.pt").read_bytes()
    expected = read_checkpoint(uninterrupted / "checkpoint.pt")
    path = tmp_path / "checkpoint.pt"
    rng = random.Random(0)
    messages = []
    for _ in range(200):
        content = mutated(raw, rng)
        path.write_bytes(content)
        try:
            state = read_checkpoint(path)
        except RunError as error:
            messages.append(str(error))
        else:
            # Some bytes of an archive are padding, or dates.
            assert_same_bits(state, expected)
        assert path.read_bytes() == content
    assert set(messages) == {f"{path}: damaged, or not a checkpoint of this package"}
    assert 150 < len(messages) < 200


def test_a_checkpoint_that_unpacks_to_more_than_itself_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(uninterrupted / "checkpoint.pt") as original, zipfile.ZipFile(path, "w") as bomb:
        for member in original.infolist():
            content = original.read(member)
            bomb.writestr(member.filename, content, zipfile.ZIP_DEFLATED)
    with pytest.raises(RunError, match="damaged"):
        read_checkpoint(path)
