"""Ending a run's job: a good save first, then scancel."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from launch import queue, state
from launch.attempt import Record
from launch.record import Submitted
from trainer.config import ConfigError

POLL, AGAIN = 1.0, 10.0  # seconds between looks, and between signals: a rank that is still starting ignores them


def cancel(run: Path, patience: float, sleep: Callable[[float], None] = time.sleep) -> str:
    """Ask all ranks to save, wait for it at most `patience` seconds, cancel the job; returns what happened in words."""
    submitted = Submitted.of(run)
    found = state.of(submitted)
    if not found.live:
        return f"{run}: job {submitted.job} has ended already ({found.name})"
    record = Record(run, submitted.job)
    (record.folder / "cancel").touch()  # from here on no attempt comes back, whatever ends it
    saved = _save(submitted, record, patience, sleep) if found.name == "RUNNING" else False
    queue.order("scancel", submitted.job)
    while (found := state.of(submitted)).live and patience > -60:
        sleep(POLL)
        patience -= POLL
    step = record.saved_step()
    if found.live:
        raise ConfigError(f"{run}: job {submitted.job} is {found.name} still: look at squeue -j {submitted.job}")
    how = "saved and cancelled" if saved else "cancelled without a new save"
    return f"{run}: job {submitted.job} {how}, the newest checkpoint is of step {step}"


def _save(submitted: Submitted, record: Record, patience: float, sleep: Callable[[float], None]) -> bool:
    """Signal the ranks until the attempt has ended after a save; False if it did not in time."""
    attempt, waited, signalled = len(record.begun()) - 1, 0.0, -AGAIN
    while waited < patience:
        ends = [line for line in record.lines() if line["event"] == "end" and line["attempt"] == attempt]
        if ends:
            return True
        if waited - signalled >= AGAIN:
            # The steps of the job alone, not its batch script.
            queue.ask("scancel", "--signal=USR2", submitted.job)
            signalled = waited
        sleep(POLL)
        waited += POLL
        if not state.of(submitted).live:
            return False
    return False
