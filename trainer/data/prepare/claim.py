"""Whose a destination is: free, begun by the same command, done by it, or somebody else's."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.data.index import DataError
from trainer.data.prepare import record, writers
from trainer.data.prepare.samples import SPLITS
from trainer.data.prepare.writers import ASIDE

_IGNORED = frozenset(("lost+found",))  # in a disk's top folder


@dataclass
class State:
    """How far a run is, and what it saw; kept in .prepare/state.json."""

    request: dict[str, Any]
    done: int = 0
    weight: int = 0
    images: dict[str, list[int]] = field(default_factory=dict)  # written, of each class
    bytes: dict[str, list[int]] = field(default_factory=dict)
    put_right: list[str] = field(default_factory=list)
    undecodable: list[str] = field(default_factory=list)
    put_right_count: int = 0
    undecodable_counts: dict[str, list[int]] = field(default_factory=dict)
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)


def check_place(root: Path, home: Path) -> None:
    """DataError for a destination that cannot be one for this source."""
    if home == root or any(root / name in (home, *home.parents) for name in ("train", "val", "validation", "test")):
        raise DataError(f"the destination {home} lies among the images of the source: choose another destination")
    if home.exists() and not home.is_dir():
        raise DataError(f"the destination {home} is a file: choose another destination")


def finished_report(home: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a data set that is done, found whole; None where it is not done."""
    report = record.read(home / record.NAME).get("prepare")
    if report is None:
        return None
    same_request(home, report["request"], request)
    for split in SPLITS:
        if request["format"] == "shards":
            writers.check_shards(home, split)
        else:
            columns = [list(report[key][split].values()) for key in ("images", "bytes")]
            writers.check_images(home, split, tuple(report["images"][split]), *columns)
    return report


def same_request(home: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """DataError unless what lies there was asked for in the same way."""
    for key in sorted(set(theirs) | set(ours)):
        if theirs.get(key) != ours.get(key):
            words = key if key in ("source", "version") else f"--{key.replace('_', '-')}"
            before, now = (values.get(key) or "left out" for values in (theirs, ours))
            change = "of other content" if key == "content" else f"with {words} {before}, now {now}"
            raise DataError(
                f"the destination {home} holds a set made {change}: repeat that command, remove the folder, "
                "or choose another destination"
            )


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """One process at a time; the system lets go of the lock however this one ends."""
    if home.exists() and not (home / ASIDE).exists() and (there := set(os.listdir(home)) - _IGNORED):
        raise DataError(
            f"the destination {home} holds something else ({min(there)}): choose another or an empty folder"
        )
    with writers.writing(home):
        (home / ASIDE).mkdir(parents=True, exist_ok=True)
        lock = open(home / ASIDE / "lock", "w")  # noqa: SIM115
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"another process prepares {home}: wait for it") from None
        yield
