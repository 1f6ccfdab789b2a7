"""Which checkpoints stay: the newest few, the best, and those that are to last. Never is the only good one removed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from trainer import checkpoint
from trainer.config import ConfigError

Stamp = tuple[tuple[int, int, int], ...]


class Retention:
    """Removes the checkpoints of `folder` that nobody needs, after each save."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        # Reading 205 MB back after each save would cost more than writing it: files that have not changed since they
        # were written or read here stay as they were found.
        self._known: dict[Path, tuple[Stamp, bool]] = {}

    def trust(self, path: Path) -> None:
        """The checkpoint at `path` was just written or verified by this process."""
        self._known[path] = _stamp(path), True

    def prune(self) -> None:
        """Keep the newest whole ones, the best whole one, the lasting ones, and whatever is newer than all those.

        A damaged one counts for nothing, so that it never costs a good one its place. With fewer whole ones than are
        to be kept nothing is removed but what a killed save left behind.
        """
        found = checkpoint.listing(self._folder)
        newest: list[checkpoint.Found] = []
        for candidate in reversed(found):
            if len(newest) < self._keep and self._whole(candidate.path):
                newest.append(candidate)
        ranked = sorted((f for f in found if f.top1 is not None), key=lambda f: (f.top1, f.step), reverse=True)
        best = next((f for f in ranked if self._whole(f.path)), None)
        for old in found if len(newest) == self._keep else []:
            if old.step < newest[-1].step and old != best and not old.lasting:
                self._remove(old.path)
        listed = {f.path for f in found}
        for leftover in self._folder.glob(".[0-9]*"):
            if leftover not in listed:
                shutil.rmtree(leftover, ignore_errors=True)

    def _remove(self, path: Path) -> None:
        """Out of the listing in one act, and then in peace: a kill in between leaves no half of it."""
        aside = path.with_name(f".{path.name.removeprefix('.')}.removed")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)
        self._known.pop(path, None)

    def _whole(self, path: Path) -> bool:
        try:
            stamp = _stamp(path)
            if path not in self._known or self._known[path][0] != stamp:
                self._known[path] = stamp, False
                checkpoint.verify(path)
                self.trust(path)
        except (OSError, ConfigError):
            return False
        return self._known[path][1]


def _stamp(path: Path) -> Stamp:
    """Changes whenever a file of the checkpoint is written to or replaced."""
    stats = [(path / name).stat() for name in ("state.pt", "manifest.json")]
    return tuple((s.st_mtime_ns, s.st_size, s.st_ino) for s in stats)
