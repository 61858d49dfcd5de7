"""The training command with one more variant, "tiny", which takes milliseconds a step: ``python -m tests.tiny``.

`start` runs it in a process that is forked from one that has imported everything already.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets
import sklearn.model_selection  # noqa: F401  here so that forked processes need not import them
import torch

from effnet_fast import create_model, scaling, train
from effnet_fast.config import Config
from effnet_fast.run_folder import RunFolder

SMALL = ["--variant", "tiny", "--dataset", "digits", "--resolution", "32", "--augment", "fast", "--batch-size", "8"]
SMALL += ["--limit-train", "64", "--limit-val", "40", "--epochs", "2"]

TIMING = ("seconds", "images_per_second", "peak_memory_bytes")


@contextlib.contextmanager
def tiny_variant() -> Iterator[None]:
    """The variant exists inside a ``with`` block."""
    with pytest.MonkeyPatch.context() as patch:
        for family in scaling.FAMILIES.values():
            patch.setitem(family.variants, "tiny", scaling.Variant(scaling.Scaling(0.1, 0.2), 0.2, 0.2))
        patch.setattr(train, "VARIANTS", (*scaling.VARIANTS, "tiny"))
        yield


def config_of(**options: Any) -> Config:
    """A run's configuration by default, of the tiny variant on the CPU."""
    defaults = vars(train._parser().parse_args(SMALL))
    del defaults["output"], defaults["resume"]
    return train._config(defaults | {"device": "cpu"} | options)


@contextlib.contextmanager
def tiny_run(folder: Path, input_size: int = 32) -> Iterator[Path]:
    """A run's folder as if the tiny variant had been trained on digits, while the variant exists.

    The statistics are those of noise, so that the classes' probabilities differ.
    """
    torch.manual_seed(0)
    with tiny_variant():
        config = asdict(config_of())
        run = RunFolder.create(
            folder, config | {"input_size": input_size, "classes": [f"digit {i}" for i in range(10)]}
        )
        model = create_model("tiny", 10)
        with torch.no_grad():
            for _ in range(20):
                model(torch.randn(16, 3, input_size, input_size))
            model.classifier.weight.mul_(10)
        state = {"model": create_model("tiny", 10).state_dict(), "ema": model.state_dict(), "epoch": 1}
        run.save_checkpoint(state | {"config": config}, best=True)
        yield folder


def main(
    arguments: list[str],
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> None:
    # The system's default, which a process that was started by the fork server would not have.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    if log is not None:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    if prepare is not None:
        prepare()
    with tiny_variant():
        train.main(arguments)


def start(
    *arguments: str,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> BaseProcess:
    """Start the command, its output in the log. prepare: called in its process first, a function of a module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.tiny"])
    process = context.Process(target=main, args=(list(arguments), log, environment, prepare))
    process.start()
    return process


def finish(process: BaseProcess, seconds: float = 300) -> int:
    """Wait for the process and return its exit status; kill it when the time is over."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"still running after {seconds} s")
    return process.exitcode


def wait_for(condition: Callable[[], Any], seconds: float = 300) -> None:
    """Until the condition is true; an assertion fails when the time is over."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def results(folder: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """What a run ended with: its last checkpoint, and its metrics without those that depend on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in row.items() if key not in TIMING} for row in rows]
    return torch.load(folder / "checkpoint.pt", weights_only=True), metrics


def assert_same_bits(one: Any, other: Any, where: str = "state") -> None:
    """Nested dicts, lists and tuples of equal tensors and values."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same_bits(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same_bits(a, b, f"{where}[{i}]")
    else:
        assert one == other, where


if __name__ == "__main__":
    main(sys.argv[1:])
