"""Checkpoints that are whole or absent. Knows nothing of training: it stores what it is given.

A checkpoint is a folder `checkpoints/STEP/` (nine digits) of `state.pt` and `manifest.json`, written aside and renamed
as the last act, after everything in it has reached the disk. The manifest holds the checksum of the state. Reading
walks from the newest to the oldest and takes the first that is whole; tensors and plain values only, never code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.config import ConfigError

FORMAT = 1


@dataclass(frozen=True)
class Found:
    """A checkpoint on disk."""

    path: Path
    step: int
    top1: float | None


def save(folder: Path, step: int, state: dict[str, Any], top1: float | None = None) -> Path:
    """Write `state` as the checkpoint of `step`; OSError or RuntimeError if the disk will not have it.

    Args:
        state: nested dictionaries and lists of tensors and plain values.
        top1: what evaluation gave, in percent, to find the best one by.
    """
    final = folder / f"{step:09d}"
    aside = folder / f".{final.name}.{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        with open(aside / "state.pt", "wb") as file:
            torch.save({"format": FORMAT, "step": step, **state}, file)
            _flush(file)
        digest, size = _digest(aside / "state.pt"), (aside / "state.pt").stat().st_size
        manifest = {"format": FORMAT, "step": step, "top1": top1, "size": size, "sha256": digest}
        with open(aside / "manifest.json", "w") as file:
            json.dump(manifest, file)
            _flush(file)
        _flush_folder(aside)
        if final.exists():  # stopped before this step was evaluated, resumed, evaluated: the newer one knows its top-1
            os.rename(final, folder / f".{final.name}.replaced")
        os.rename(aside, final)
        _flush_folder(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best one, and what a killed save left behind."""
    found = listing(folder)
    best = max((f for f in found if f.top1 is not None), key=lambda f: (f.top1, f.step), default=None)
    for old in found[:-keep]:
        if best is None or old.path != best.path:
            shutil.rmtree(old.path, ignore_errors=True)
    for leftover in folder.glob(".[0-9]*"):
        shutil.rmtree(leftover, ignore_errors=True)


def listing(folder: Path) -> list[Found]:
    """The checkpoints of `folder` by their manifests, oldest first; not yet verified."""
    found = []
    for path in folder.glob("[0-9]" * 9):
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            found.append(Found(path, int(manifest["step"]), manifest["top1"]))
        except (OSError, ValueError, KeyError):
            # Still listed, by its name, so that whoever reads it says what is wrong with it.
            found.append(Found(path, int(path.name), None))
    return sorted(found, key=lambda f: f.step)


def verify(path: Path) -> None:
    """Return if the checkpoint at `path` is whole and of this format; ConfigError says what is wrong with it."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        found, size, digest = manifest["format"], manifest["size"], manifest["sha256"]
        state = path / "state.pt"
        whole = state.stat().st_size == size and _digest(state) == digest
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not a whole checkpoint: {' '.join(str(error).split())}") from error
    if found != FORMAT:
        raise ConfigError(f"{path} has format {found}, this version reads {FORMAT}: use the version that wrote it")
    if not whole:
        raise ConfigError(f"{state} is damaged: its size or checksum is not that of its manifest")


def load(path: Path) -> dict[str, Any]:
    """The state stored at `path`, on the CPU; ConfigError if it is not a plain state."""
    try:
        return torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch each have their own
        raise ConfigError(f"{path / 'state.pt'} cannot be read: {' '.join(str(error).split())[:200]}") from error


def newest_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint, None where there is none at all.

    Each damaged one on the way is warned of by name. ConfigError where every one is damaged: starting again from
    nothing in silence would be the worst answer.
    """
    found = listing(folder)
    for checkpoint in reversed(found):
        try:
            verify(checkpoint.path)
            return checkpoint.path
        except ConfigError as error:
            warnings.warn(f"{error}; falling back to the one before", stacklevel=2)
    if found:
        raise ConfigError(f"no checkpoint in {folder} is whole: restore one, or remove the folder to start again")
    return None


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make the names in `folder` durable, not just the files they stand for."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()  # not hashlib.file_digest, which Python 3.10 lacks
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
