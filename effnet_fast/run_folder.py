"""A run's folder on disk: config.json, metrics.jsonl, checkpoint.pt, best.pt. Files are replaced atomically."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

CHECKPOINTS = {"latest": "checkpoint.pt", "best": "best.pt"}


class RunError(ValueError):
    """A run folder that can't be read or written; the message is one line that names the file."""


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace a file so that a reader, or a crash at any moment, sees the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class RunFolder:
    """Reads and writes one run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: dict[str, Any]) -> "RunFolder":
        """Start a run in a new or empty folder. Raises RunError if a run is already there."""
        run = cls(path)
        if (path / "config.json").exists():
            raise RunError(f"--output: {path} already holds a run; name another folder or delete it")
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_atomic(path / "config.json", lambda file: file.write(json.dumps(config, indent=2).encode()))
        except OSError as error:
            raise RunError(f"--output: can't write to {path}: {error.strerror}") from None
        return run

    def config(self) -> dict[str, Any]:
        """The configuration that the run was started with."""
        path = self.path / "config.json"
        try:
            config = json.loads(path.read_text())
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}; give the folder of a training run") from None
        except ValueError:
            raise RunError(f"{path}: not a JSON file; give the folder of a training run") from None
        if not isinstance(config, dict):
            raise RunError(f"{path}: not a run's configuration; give the folder of a training run")
        return config

    def append_metrics(self, metrics: dict[str, float]) -> None:
        """Add one epoch's line to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")

    def metrics(self) -> list[dict[str, float]]:
        """All epochs so far."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def save_checkpoint(self, state: dict[str, Any], *, best: bool) -> None:
        """Replace checkpoint.pt, and best.pt too if `best`."""
        for which in ("latest", "best") if best else ("latest",):
            write_atomic(self.path / CHECKPOINTS[which], lambda file: torch.save(state, file))

    def load_checkpoint(self, which: str) -> dict[str, Any]:
        """Read "latest" or "best" onto the CPU; nothing in the file is executed."""
        path = self.path / CHECKPOINTS[which]
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}") from None
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
            raise RunError(f"{path}: truncated, or not a checkpoint of this package") from None
        if not isinstance(state, dict) or not {"model", "ema", "epoch"} <= state.keys():
            raise RunError(f"{path}: not a checkpoint of this package")
        return state
