"""The code that a job runs: a copy of the working tree's tracked files, so that later edits cannot leak into it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import trainer

ROOT = Path(trainer.__file__).resolve().parents[1]
PACKAGES = ("trainer", "launch")
RECORD = "SNAPSHOT.json"  # in the copy: what trainer.report.folder says of the code that runs


def take(destination: Path, source: Path = ROOT) -> dict[str, object]:
    """Copy `source` as it is now to `destination`, with `diff.patch` beside it; returns what commit it is.

    Files that git tracks are copied as they stand in the working tree, with changes that are not committed yet. Where
    `source` is no git checkout (an installed package), the packages themselves are copied.
    """
    commit = _git(source, "rev-parse", "HEAD")
    tracked = _git(source, "ls-files", "-z")
    if commit and tracked:
        for name in filter(None, tracked.split("\0")):
            if (source / name).is_file() and not (source / name).is_symlink():
                (destination / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source / name, destination / name)
        diff = _git(source, "diff", "--binary", "HEAD") or ""
        (destination.parent / "diff.patch").write_text(diff, errors="surrogateescape")
        record = {"commit": commit.strip(), "dirty": bool(diff)}
    else:
        for name in PACKAGES:
            shutil.copytree(source / name, destination / name, ignore=shutil.ignore_patterns("__pycache__"))
        record = {"commit": None, "dirty": False}
    (destination / RECORD).write_text(json.dumps(record) + "\n")
    return record


def untracked(source: Path = ROOT) -> list[str]:
    """Python files of the packages that git does not track, and that a job would therefore miss."""
    listed = _git(source, "ls-files", "--others", "--exclude-standard", "-z", *PACKAGES) or ""
    return [name for name in listed.split("\0") if name.endswith(".py")]


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="surrogateescape") if done.returncode == 0 else None
