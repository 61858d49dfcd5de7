"""What all commands share."""

import importlib
import subprocess
import sys
from importlib.metadata import version

import pytest

from effnet_fast.__main__ import commands, main


def test_the_package_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    lines = capsys.readouterr().out.splitlines()[1:]
    listed = {line.split()[2].removeprefix("effnet_fast."): line.split(maxsplit=3)[3] for line in lines}
    assert {"train", "evaluate", "predict", "cam", "export", "summary", "doctor"} <= listed.keys()
    assert listed["train"] == "Train a variant"
    assert listed["evaluate"] == "Re-evaluate a run's checkpoint"


@pytest.mark.parametrize("name", ["__main__", *commands()])
def test_every_command_tells_its_version(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"effnet_fast.{name}").main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"effnet_fast {version('effnet_fast')}\n"


def test_the_package_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "effnet_fast", "--nonsense"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert done.stderr == "python -m effnet_fast: error: unrecognized arguments: --nonsense\n"
