"""metrics.jsonl as rows of W&B's history: one a step, the values by section (train/, eval/, perf/)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

AXES = ("step", "epoch", "samples", "wall_seconds")
PERFORMANCE = (
    "images_per_second",
    "images_per_second_per_gpu",
    "step_seconds",
    "data_wait_fraction",
    "allreduce_fraction",
    "rank_wait_fraction",
    "slowest_rank",
    "slowest_rank_excess",
    "slowest_rank_by",
    "mfu",
    "max_memory_gb",
    "gpu_utilisation",
)


@dataclass(frozen=True)
class Position:
    """How far a history goes: the step of its last row, and that of the last one that tells of an evaluation."""

    step: int = 0
    evaluated: int = 0

    @classmethod
    def of(cls, row: dict[str, Any]) -> Position:
        """Where a row stands, or W&B's summary, which holds the last value of every key."""
        return cls(int(row.get("trainer/step") or 0), int(row.get("eval/step") or 0))

    def after(self, other: Position) -> Position:
        return Position(max(self.step, other.step), max(self.evaluated, other.evaluated))

    def misses(self, record: dict[str, Any]) -> bool:
        return record["step"] > (self.evaluated if record["kind"] == "eval" else self.step)


def read(metrics: Path) -> list[dict[str, Any]]:
    """The records of a run so far, oldest first, without a line that is not whole (yet)."""
    return list(reversed(list(_newest_first(metrics))))


def missing(metrics: Path, position: Position, until: float) -> Iterator[dict[str, Any]]:
    """The rows that a history which goes to `position` lacks, up to step `until`, oldest first."""
    found = []
    for record in _newest_first(metrics):
        if record["step"] < position.step:  # and so are all before it
            break
        if record["step"] <= until and position.misses(record):
            found.append(record)
    for _, records in groupby(reversed(found), key=lambda record: record["step"]):
        row: dict[str, Any] = {}
        for record in records:
            row |= _row(record)
        yield row


def _row(record: dict[str, Any]) -> dict[str, Any]:
    kind = record["kind"]
    row = {f"trainer/{axis}": record[axis] for axis in AXES if axis in record}
    if kind == "eval":
        row["eval/step"] = record["step"]
    for key, value in record.items():
        if key not in ("kind", *AXES) and value is not None:
            row[f"{'perf' if key in PERFORMANCE else kind}/{key}"] = value
    return row


def _newest_first(metrics: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = metrics.read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in reversed(lines):
        try:
            yield json.loads(line)
        except ValueError:
            continue
