"""Who holds up a run, as two ranks' watches see it; tests/test_ranks.py has real ranks that hang."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from trainer.distributed import World
from trainer.watchdog import Watch

HANG_AFTER = 2.0


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[Watch], list[str]]]:
    said: list[str] = []
    monkeypatch.setattr(Watch, "_end", lambda self, why: (said.append(why), self._over.set()))
    store = dist.TCPStore("localhost", 0, is_master=True, timeout=datetime.timedelta(seconds=30))
    ranks = [World(rank, rank, 2, 2, torch.device("cpu"), None, store) for rank in (0, 1)]
    watches = [Watch(here, tmp_path, HANG_AFTER) for here in ranks]
    with watches[0], watches[1]:
        for watch in watches:
            for phase in ("data", "forward", "backward"):
                watch.enter(phase, 5)
        yield watches, said


def wait(said: list[str], seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while not said and time.monotonic() < deadline:
        time.sleep(0.05)
    return said[0] if said else ""


def test_the_rank_that_came_least_far_is_named(pair: tuple[list[Watch], list[str]]) -> None:
    watches, said = pair
    watches[0].enter("update", 5)
    found = wait(said, 60)
    assert "rank 1 holds up the run" in found and "in step 5, phase backward" in found and "rank 0" not in found


def test_a_rank_without_a_beat_is_named_whoever_is_behind(pair: tuple[list[Watch], list[str]]) -> None:
    watches, said = pair
    watches[1].enter("update", 5)
    watches[1]._over.set()
    assert "rank 1 no longer answers" in wait(said, 60)


def test_moving_and_saving_are_no_hang(pair: tuple[list[Watch], list[str]]) -> None:
    watches, said = pair
    for watch in watches:
        watch.enter("save")
    watches[0].enter("data", 6)  # it waits for the main rank, which saves for long
    assert not wait(said, 3 * HANG_AFTER)
    for watch in watches:
        watch.enter("evaluate")
    for _ in range(30):
        time.sleep(HANG_AFTER / 10)
        for watch in watches:
            watch.moved()
    assert not said
