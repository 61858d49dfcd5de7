"""What all tests share."""

import multiprocessing
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test() -> Iterator[None]:
    """Python would wait for it at the end, for ever if it waits for another one itself."""
    yield
    for process in multiprocessing.active_children():
        if not process.daemon:  # others end with Python
            process.kill()
            process.join()
