"""The signals that stop a run: remembered from the first moment, acted upon where the run can be saved.

Imports no torch, so that the handler stands before the seconds that importing it takes.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
INTERRUPTED = 130  # exit status of a second SIGINT
_GRACE = 1.0  # seconds a second SIGINT leaves to Python's own way out


class Stopped(Exception):
    """A stop signal, met where nothing is to be saved yet."""

    @property
    def name(self) -> str:
        return signal.Signals(self.args[0]).name


class StopSignals:
    """The handler of the stop signals: it sets `caught`, nothing else. A second SIGINT ends the process at once.

    Python runs handlers between two of its own instructions, so a process that waits inside a collective runs none. A
    thread that the kernel's side of the handler writes to sees to the second SIGINT there.
    """

    def __init__(self) -> None:
        self.caught = 0  # the last stop signal, 0 for none
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        self._previous_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        with held():
            threading.Thread(target=self._insist, name="signals", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._writer.close()  # ends the thread

    def raise_if_caught(self) -> None:
        """Stopped, if a stop signal has come."""
        if self.caught:
            raise Stopped(self.caught)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.caught == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = number

    def _insist(self) -> None:
        """End the process a moment after its second SIGINT, if it is still there."""
        interrupts = 0
        while numbers := self._reader.recv(64):
            interrupts += numbers.count(signal.SIGINT)
            if interrupts >= 2:
                time.sleep(_GRACE)
                if self._writer.fileno() >= 0:
                    print("error: interrupted twice: nothing more is saved", file=sys.stderr, flush=True)
                    os._exit(INTERRUPTED)
        self._reader.close()


@contextmanager
def held() -> Iterator[None]:
    """Keep the stop signals from threads that start inside: they come to the main thread and wake it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
