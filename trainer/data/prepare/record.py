"""report.json, in which `prepare` and `inspect` each keep their part under a key of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from trainer.data.index import DataError

NAME = "report.json"
KEYS = ("prepare", "inspection")


def read(path: Path) -> dict[str, Any]:
    """The parts in a report.json, empty where there is none; DataError where the file is something else."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or not set(found) <= set(KEYS):
        raise DataError(f"{path} exists and is not a report of ours: move it away")
    return found


def write(path: Path, key: str, value: dict[str, Any], aside: Path) -> None:
    """Set one part, leaving the other; whole or not at all, by way of the file `aside` on the same disk.

    Raises OSError, or DataError as `read`.
    """
    parts = read(path) | {key: value}
    try:
        with open(aside, "w") as file:
            json.dump(parts, file, indent=1)
            file.write("\n")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
