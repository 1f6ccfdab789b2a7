"""Saves behind the run's back: a copy of the state at a step boundary, written by a thread while training goes on.

One save is in flight at a time. A save that falls due before the last one is on disk waits for it, and says so once:
dropping either would break the promise of checkpoint.every_steps, and queueing would need a second copy of the state.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer import checkpoint
from trainer.config import Checkpoint, RunError
from trainer.retention import Retention
from trainer.signals import held
from trainer.snapshot import Snapshot

NOTICEABLE = 1.0  # seconds of waiting that are worth a warning


class SaveError(RunError):
    """The last state of the run could not be saved."""

    everywhere = False


def save_due(options: Checkpoint, step: int, minutes: float) -> bool:
    """Whether to save after `step` steps and `minutes` since the last save."""
    by_steps = options.every_steps is not None and step % options.every_steps == 0
    return by_steps or (options.every_minutes is not None and minutes >= options.every_minutes)


@dataclass(frozen=True)
class _Task:
    step: int
    state: dict[str, Any]
    label: checkpoint.Label


class NoSaver:
    """Saves nothing: what the ranks other than the main one have. Methods are the main thread's."""

    def reserve(self, state: Callable[[], dict[str, Any]]) -> None:
        """Make room for a state like this one while training goes on, so that the first save is as short as any."""

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Have `optimizer` wait before each update for whatever copy still reads the weights."""
        optimizer.register_step_pre_hook(lambda *_: self.settle())

    def settle(self) -> None:
        """Return when the tensors said to stay still may change again."""

    def save(
        self,
        step: int,
        state: dict[str, Any],
        label: checkpoint.Label | None = None,
        still: frozenset[int] = frozenset(),
    ) -> None:
        """Begin to copy `state` and to write it as the checkpoint of `step`.

        Args:
            still: `data_ptr()` of the tensors that nobody changes before `settle`; all others may change at once.
        """

    def check(self) -> None:
        """Say what went wrong with a save since the last time; RunError if the folder is no longer ours."""

    def finish(self) -> None:
        """Return when the last state is on disk; what failed is tried once more, SaveError if it fails again."""

    def close(self) -> None:
        """Wait for the save in flight, whatever becomes of it."""


class Saver(NoSaver):
    """The checkpoints of one run as they are made."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        permitted: Callable[[], None],
        say: Callable[[str], None] = print,
        saved: Callable[[int], None] = lambda step: None,
    ) -> None:
        """
        Args:
            keep: how many of the newest stay.
            permitted: raises RunError if the folder has become another process's.
            say: tells the user a line.
            saved: called, by any thread, with the step whose state has reached the disk.
        """
        self._folder, self._permitted, self._say, self._saved = folder, permitted, say, saved
        self._retention = Retention(folder, keep)
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._unsaved: _Task | None = None
        self._failure: OSError | None = None  # the disk's: said, and training goes on
        self._fatal: BaseException | None = None
        self._slow = self._reserved = False

    def reserve(self, state: Callable[[], dict[str, Any]]) -> None:
        if self._reserved:
            return
        self._reserved = True
        like = state()
        self._begin(lambda: self._snapshot.reserve(like))

    def settle(self) -> None:
        self._snapshot.settle()

    def save(
        self,
        step: int,
        state: dict[str, Any],
        label: checkpoint.Label | None = None,
        still: frozenset[int] = frozenset(),
    ) -> None:
        began = time.monotonic()
        self._join()
        waited = time.monotonic() - began
        self.check()
        if waited > NOTICEABLE and not self._slow:
            self._slow = True
            self._say(
                f"warning: the save of step {step} waited {waited:.1f} s for the one before: this disk is slower than "
                "checkpoint.every_steps or checkpoint.every_minutes asks for"
            )
        self._unsaved = _Task(step, self._snapshot.take(state, still), label or checkpoint.Label())
        self._begin(self._write)

    def check(self) -> None:
        if self._fatal is not None:
            raise self._fatal
        failure, self._failure = self._failure, None
        if failure is None:
            return
        what = "older checkpoints stay" if self._unsaved is None else f"step {self._unsaved.step} is not saved"
        self._say(f"warning: {what} ({_words(failure)}); training goes on")

    def finish(self) -> None:
        self._join()
        self.check()
        if self._unsaved is None:
            return
        self._write()
        failure, self._failure = self._failure, None
        self.check()
        if self._unsaved is not None:
            raise SaveError(
                f"step {self._unsaved.step} is not saved, at the second try either ({_words(failure)}): make "
                f"{self._folder} writable; the same command then goes on from the last save"
            )

    def close(self) -> None:
        self._join()

    def _begin(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._fatal = error

        self._join()
        # A daemon: a second Ctrl-C ends the process without waiting for a disk that hangs.
        self._thread = threading.Thread(target=run, name="saver", daemon=True)
        with held():
            self._thread.start()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self) -> None:
        """Save the task and remove what it makes superfluous."""
        task = self._unsaved
        assert task is not None
        try:
            self._snapshot.complete()
            path = checkpoint.save(self._folder, task.step, task.state, task.label, self._permitted)
            self._retention.trust(path)
            self._unsaved = None
            self._saved(task.step)
            self._permitted()
            self._retention.prune()
        except OSError as error:
            self._failure = error


def _words(error: OSError | None) -> str:
    return getattr(error, "strerror", None) or str(error)
