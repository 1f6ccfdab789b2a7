"""What happened to a run besides its steps: starts, saves, evaluations, ends; a line each in events.jsonl."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from trainer.report.folder import RunFolder

NAME = "events.jsonl"


class Events:
    """Appends to events.jsonl of one run. What has happened has happened: a resumed run takes no line back."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._attempt = 1 + sum(event["kind"] == "start" for event in read(folder.path))

    def add(self, kind: str, step: int, wall_seconds: float, seconds: float, **more: Any) -> None:
        """Write down that `kind` (start | save | eval | end) took `seconds` of training's time after `step` steps.

        Args:
            wall_seconds: since the run began, over all restarts; of a start, where the attempt before it left off.
        """
        event = {"kind": kind, "step": step, "attempt": self._attempt, "wall_seconds": round(wall_seconds, 3)}
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._folder.add_line(NAME, {**event, "seconds": round(seconds, 4), "time": now, **more})


def read(folder: Path) -> list[dict[str, Any]]:
    """The events of the run in `folder`, oldest first; lines that a kill cut short are left out."""
    return [event for event in read_lines(folder / NAME) if {"kind", "step", "wall_seconds", "seconds"} <= event.keys()]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, [] where there is none; what is no whole object is left out."""
    found = []
    try:
        with open(path, "rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    found.append(record)
    except OSError:
        pass
    return found


def process_age() -> float:
    """Seconds since this process began, by the kernel's account; 0.0 where there is none (no /proc)."""
    try:
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, ValueError, IndexError):
        return 0.0
