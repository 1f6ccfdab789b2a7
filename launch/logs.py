"""What a rank said, attempt by attempt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launch import state
from launch.attempt import Record
from launch.record import Submitted
from trainer.config import ConfigError

POLL, ASK = 0.5, 15.0  # seconds between looks at the file, and between questions to the queue


def files(submitted: Submitted, rank: int) -> list[Path]:
    """The logs of `rank`, of the first attempt to the newest; only those that exist."""
    attempts = range(len(Record(submitted.run, submitted.job).begun()))
    logs = (submitted.launch.log(submitted.index, attempt, rank) for attempt in attempts)
    return [path for path in logs if path.exists()]


def text(run: Path, rank: int) -> str:
    """All attempts' logs of `rank`, each under its name; the batch script's where no rank has begun."""
    submitted = Submitted.of(run)
    if rank >= submitted.launch.ranks:
        raise ConfigError(f"--rank {rank}: the ranks of {run} are 0 to {submitted.launch.ranks - 1}")
    found = files(submitted, rank)
    batch = submitted.launch.job_log(submitted.job)
    if not found and batch.exists():
        found = [batch]
    if not found:
        name = state.of(submitted).name
        return f"no log of rank {rank} yet: job {submitted.job} is {name}\n"
    return "".join(f"==> {path} <==\n{path.read_text(errors='replace')}\n" for path in found)


def follow(run: Path, rank: int, sleep: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """The newest attempt's log of `rank` as it grows, over requeues, until the job has ended for good."""
    submitted, shown, offset, asked = Submitted.of(run), None, 0, 0.0
    while True:
        over = False
        if asked <= 0:
            over, asked = not state.of(submitted).live, ASK
        newest = files(submitted, rank)[-1:]
        if newest and newest[0] != shown:
            shown, offset = newest[0], 0
            yield f"==> {shown} <==\n"
        if shown is not None:
            with open(shown, "rb") as file:
                file.seek(offset)
                new = file.read()
            offset += len(new)
            if new:
                yield new.decode(errors="replace")
        if over:
            return
        sleep(POLL)
        asked -= POLL
