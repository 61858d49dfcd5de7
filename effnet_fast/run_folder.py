"""A run's folder on disk: config.json, metrics.jsonl, checkpoint.pt, best.pt. Files are replaced atomically."""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

CHECKPOINTS = {"latest": "checkpoint.pt", "best": "best.pt"}


class RunError(ValueError):
    """A run folder that can't be read or written; the message is one line that names the file."""


_TEMPORARY = re.compile(r"\.(config\.json|metrics\.jsonl|checkpoint(-\d+)?\.pt|best\.pt|curves\.png)\.\d+")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace a file so that a reader, or a crash at any moment, sees the old or the new content, never a part."""
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Nothing in the file is executed, and damage anywhere in it is noticed.

    Raises RunError whose line names the file.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 closed below
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from None
    with file:
        try:
            check_archive(file)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        # A damaged archive makes zipfile and torch raise nearly every built-in exception.
        except Exception:
            raise RunError(f"{path}: damaged, or not a checkpoint of this package") from None
    if not isinstance(state, dict) or not {"model", "ema", "epoch"} <= state.keys():
        raise RunError(f"{path}: not a checkpoint of this package")
    return state


def read_json(path: Path, of: str) -> Any:
    """What a JSON file in the folder of a "training run", say, holds. Raises RunError, which asks for such a folder."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; give the folder of a {of}") from None
    except (ValueError, RecursionError):
        raise RunError(f"{path}: not a JSON file; give the folder of a {of}") from None


def check_archive(file: BinaryIO) -> None:
    """Raise for a zip file that torch.save did not write, or not so: torch itself compares no checksums."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        # Members are stored as they are. Compressed or overlapping ones could unpack to any size.
        size = os.fstat(file.fileno()).st_size
        if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
            raise ValueError("compressed")
        if archive.testzip() is not None:
            raise ValueError("checksum")


class RunFolder:
    """Reads and writes one run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: dict[str, Any]) -> "RunFolder":
        """Start a run in a new or empty folder. Raises RunError if a run is already there."""
        run = cls(path)
        if run.has_run():
            raise RunError(f"--output: {path} already holds a run; name another folder, or go on with --resume auto")
        try:
            path.mkdir(parents=True, exist_ok=True)
            run._start(config)
        except OSError as error:
            raise RunError(f"--output: can't write to {path}: {error.strerror}") from None
        return run

    def _start(self, config: dict[str, Any]) -> None:
        for path in self.path.iterdir():
            # What a process left that was killed while it wrote.
            if _TEMPORARY.fullmatch(path.name):
                path.unlink()
        write_atomic(self.path / "config.json", lambda file: file.write(json.dumps(config, indent=2).encode()))

    def config(self) -> dict[str, Any]:
        """The configuration that the run was started with."""
        path = self.path / "config.json"
        config = read_json(path, "training run")
        if not isinstance(config, dict):
            raise RunError(f"{path}: not a run's configuration; give the folder of a training run")
        return config

    def has_run(self) -> bool:
        """Whether a run was started here."""
        return (self.path / "config.json").exists()

    def reopen(self, config: dict[str, Any], epochs: int) -> None:
        """Make the folder ready to go on after so many finished epochs: later metrics and half-written files go.

        Raises RunError if it can't be written to, or its metrics are damaged.
        """
        try:
            self._start(config)
            # Epochs that an older checkpoint does not know of, and a line that was cut off by a full disk.
            path = self.path / "metrics.jsonl"
            if path.exists():
                kept = b"".join(path.read_bytes().splitlines(keepends=True)[:epochs])
                write_atomic(path, lambda file: file.write(kept))
                self.metrics()  # a damaged file is better noticed now than after an epoch
        except OSError as error:
            raise RunError(f"{self.path}: can't be written to: {error.strerror}") from None

    def append_metrics(self, metrics: dict[str, float]) -> None:
        """Add one epoch's line to metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps(metrics) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"{path}: can't be written: {error.strerror}") from None

    def metrics(self) -> list[dict[str, float]]:
        """All epochs so far; a last line that was cut off is left out.

        Raises RunError if the file is not what `append_metrics` writes.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        try:
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except ValueError:
            raise RunError(f"{path}: damaged, a line of it is not JSON") from None

    def save_checkpoint(self, state: dict[str, Any], *, best: bool, keep: int = 1) -> None:
        """Replace checkpoint.pt, and best.pt too if `best`.

        keep: how many of the latest stay, this one included: those before it are checkpoint-1.pt, checkpoint-2.pt, ...

        Raises RunError if the file can't be written; what was there before is still there then.
        """
        latest = self.path / CHECKPOINTS["latest"]
        names = [latest, *(self.path / f"checkpoint-{i}.pt" for i in range(1, keep))]
        try:
            for newer, older in zip(names[-2::-1], names[:0:-1], strict=True):
                if newer.exists():
                    _link(newer, older)
            # The best one first: killed in between, a resumed run comes here once more.
            written = self.path / CHECKPOINTS["best"] if best else latest
            write_atomic(written, lambda file: _save(state, file))
            if best:
                _link(written, latest)
        except OSError as error:
            kept = "the checkpoint before is kept" if latest.exists() else "there is none before it"
            raise RunError(f"{latest}: can't be written: {error.strerror}; {kept}") from None

    def load_checkpoint(self, which: str) -> dict[str, Any]:
        """Read "latest" or "best", as `read_checkpoint`."""
        return read_checkpoint(self.path / CHECKPOINTS[which])

    def checkpoints(self) -> Iterator[Path]:
        """The checkpoints there are, latest first; best.pt, which may be older than all others, last."""
        older = (path for path in self.path.glob("checkpoint-*.pt") if re.fullmatch(r"checkpoint-\d+", path.stem))
        by_age = sorted(older, key=lambda path: int(path.stem.partition("-")[2]))
        candidates = (self.path / CHECKPOINTS["latest"], *by_age, self.path / CHECKPOINTS["best"])
        return (path for path in candidates if path.exists())


def _save(state: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # torch's own complaint about the half-written file hides the reason.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _link(source: Path, target: Path) -> None:
    """Atomically make `target` another name of the file `source`: a copy of it where there are no hard links."""
    temporary = _temporary(target)
    try:
        os.link(source, temporary)
    except OSError:
        with open(source, "rb") as original:
            write_atomic(target, lambda file: shutil.copyfileobj(original, file))
        return
    os.replace(temporary, target)
    # Still there if both names were the same file's already.
    temporary.unlink(missing_ok=True)
    _sync(target.parent)
