"""Runs that are told how much memory there is, and runs that find out."""

import ctypes
import json
import re
import resource
from pathlib import Path

from effnet_fast.trainer import make_planner
from tests.tiny import SMALL, config_of, finish, start, tiny_variant

B0 = ["--variant", "b0", "--dataset", "digits", "--resolution", "96", "--augment", "fast", "--amp", "off"]
B0 += ["--batch-size", "80", "--limit-train", "80", "--limit-val", "8", "--device", "cpu", "--num-workers", "0"]


def leave_little() -> None:
    """This process may take 800 MB more, of which training gets what is left by data and plots."""
    ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX: threads would reserve address space for heaps of their own
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 800_000_000,) * 2)


def test_the_run_ends_with_the_options_that_fit(tmp_path: Path) -> None:
    """One line, an intact checkpoint, and a resumed run that does fit, in the same little memory."""
    run, log = tmp_path / "run", tmp_path / "log"
    more = ["--output", str(run), "--resume", "auto", "--epochs"]
    assert finish(start(*B0, *more, "1", log=log)) == 0, log.read_text()
    before = (run / "checkpoint.pt").read_bytes()
    assert finish(start(*B0, *more, "2", log=log, prepare=leave_little)) == 1
    assert "Traceback" not in log.read_text()
    lines = log.read_text().splitlines()
    assert lines[0].startswith("warning: memory may run out: a step of batch 80 at 96 px needs 57")
    assert (run / "checkpoint.pt").read_bytes() == before
    advice = re.search(r"out of memory: a step of .* with --memory fast, there are .* MB; --memory (\d+MB) ", lines[-1])
    assert advice, lines[-1]
    assert finish(start(*B0, *more, "2", "--memory", advice[1], log=log, prepare=leave_little)) == 0, log.read_text()
    assert json.loads((run / "config.json").read_text())["memory"] == advice[1]


def test_the_largest_batch_of_a_budget(tmp_path: Path) -> None:
    """What --batch-size auto takes is what the run then has, also when it goes on."""
    run, log = tmp_path / "run", tmp_path / "log"
    more = [*SMALL, "--memory", "12MB", "--batch-size", "auto", "--output", str(run), "--resume", "auto"]
    assert finish(start(*more, "--epochs", "1", log=log)) == 0, log.read_text()
    config = json.loads((run / "config.json").read_text())
    assert config["batch_size"] > 8
    with tiny_variant():
        planner = make_planner(config_of(amp=config["amp"]), 1000)
    assert config["batch_size"] == planner.largest_batch(12_000_000)
    assert "Memory: " in log.read_text()
    assert finish(start(*more, "--epochs", "2", log=log)) == 0, log.read_text()
    assert json.loads((run / "config.json").read_text())["batch_size"] == config["batch_size"]
