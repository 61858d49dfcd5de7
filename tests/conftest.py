"""What all tests share."""

import importlib
import multiprocessing
import os
from collections.abc import Iterator

import pytest

# Removed, because pytest-benchmark would take a pytest that a test starts for one of pytest-xdist's workers as well.
if os.environ.pop("PYTEST_XDIST_WORKER", None):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core for each worker; read when torch is imported


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test() -> Iterator[None]:
    """Python would wait for it at the end, for ever if it waits for another one itself."""
    yield
    for process in multiprocessing.active_children():
        if not process.daemon:  # others end with Python
            process.kill()
            process.join()


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block stores what it expands to, as on most processors: for tests with budgets that are right there."""
    module = importlib.import_module("effnet_fast.ops.mbconv")  # torch is imported here, after the above
    monkeypatch.setattr(module, "SWEPT_PIXELS", float("inf"))
