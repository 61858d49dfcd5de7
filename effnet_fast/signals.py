"""Ending a command by a signal, at a moment of its own choice."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

Item = TypeVar("Item")

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The work was ended by a signal; `status` is the exit status by the shells' convention."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


class StopSignals:
    """Inside the ``with`` block the first SIGTERM or SIGINT is noted only; a second one acts as it did before."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self.__exit__()

    def check(self) -> None:
        """Raises Stopped once a signal was received."""
        if self.received is not None:
            raise Stopped(self.received)

    def between(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, with a check before each."""
        for item in items:
            self.check()
            yield item


def obey_parent_only() -> None:
    """In a process that was started with `SIGNALS` blocked: a SIGTERM from its parent ends it, others do nothing.

    Python ends the processes of a pool or a loader with SIGTERM when it exits, and waits for them.
    """

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
