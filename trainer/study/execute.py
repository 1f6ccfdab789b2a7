"""Runs the runs of a study one after the other, each as the ordinary train command in a process of its own."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from types import FrameType
from typing import Any

from trainer.mistakes import warn
from trainer.report.folder import RunFolder
from trainer.signals import STOP_SIGNALS, Stopped
from trainer.study.grid import Run
from trainer.study.records import finished

STOPPED = 75  # what a train command answers that was stopped by a signal


def command(run: Run, ranks: int) -> list[str]:
    """The command line that trains `run`, or goes on with it."""
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    return [*start, "trainer", "train", str(run.recipe), *run.words]


def execute(runs: list[Run], ranks: int) -> list[str]:
    """Train what is not finished; returns the runs that failed, each with its exit status, for the others go on.

    Raises Stopped where a signal, to this process or to a run, stopped the run under way after a save.
    """
    failed = []
    with _PassingOn() as signals:
        for number, run in enumerate(runs, start=1):
            where = f"study {number}/{len(runs)} {run}"
            if finished(run.config):
                print(f"{where}: finished, {run.folder}", flush=True)
                continue
            words = command(run, ranks)
            print(f"{where}: {shlex.join(words)}", flush=True)
            before = _written(run)
            status = signals.run(words)
            if signals.caught:
                raise Stopped(signals.caught)
            # torchrun makes a 1 of the 75, but the run has said so.
            said = (RunFolder(run.folder).read("summary.json") or {}).get("status") if _written(run) != before else None
            if status == STOPPED or (status and said == "stopped"):
                raise Stopped(signal.SIGTERM)
            if status:
                failed.append(f"{run} (exit status {status}, {run.folder})")
                warn(f"{where} failed with exit status {status}; the others go on")
    return failed


def _written(run: Run) -> int | None:
    """When its summary was written, in ns; None: never."""
    path = run.folder / "summary.json"
    return path.stat().st_mtime_ns if path.exists() else None


class _PassingOn:
    """Hands the stop signals on to the command under way.

    The command is kept out of this process group: of an interrupt typed at a terminal it would else get two, and the
    second means to end without a save. A hang-up is a reason to stop too, for nothing would reach the command later.
    """

    def __init__(self) -> None:
        self.caught = 0
        self._process: subprocess.Popen | None = None
        self._passed = False  # on to the command; an interrupt twice would end it without a save
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _PassingOn:
        numbers = (*STOP_SIGNALS, signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(self, words: list[str]) -> int:
        """Run a command to its end, unless a signal has come before it; returns its exit status."""
        if self.caught:
            return STOPPED
        self._process = subprocess.Popen(words, preexec_fn=os.setpgrp)
        if self.caught and not self._passed:  # it came while the command was being started
            self._pass_on(self.caught)
        try:
            return self._process.wait()
        finally:
            self._process = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        if self._process is not None:
            self._passed = True
            # torchrun hands on these two and dies of the others (docs/guarantees.md).
            self._process.send_signal(number if number == signal.SIGINT else signal.SIGTERM)
