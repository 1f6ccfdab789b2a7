"""Checkpoints that are whole or absent. Knows nothing of training: it stores what it is given.

A checkpoint is a folder `checkpoints/STEP/` (nine digits) of `state.pt` and `manifest.json`, written aside and renamed
as the last act, after everything in it has reached the disk. The manifest holds the checksum of the state. Reading
walks from the newest to the oldest and takes the first that is whole; tensors and plain values only, never code.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from trainer.config import ConfigError
from trainer.mistakes import warn

FORMAT = 1
NAME = "[0-9]" * 9
REPLACED = ".replaced"  # a checkpoint that the next of the same step is taking the place of


@dataclass(frozen=True)
class Found:
    """A checkpoint on disk, by its manifest; not yet verified."""

    path: Path
    step: int
    top1: float | None = None
    lasting: bool = False


@dataclass(frozen=True, kw_only=True)
class Label:
    """What the manifest says of a checkpoint beside its step."""

    top1: float | None = None  # what evaluation gave, in percent, to find the best one by
    lasting: bool = False  # never to be removed


def always() -> None:
    """Permission for whoever needs none."""


def save(
    folder: Path, step: int, state: dict[str, Any], label: Label | None = None, permitted: Callable[[], None] = always
) -> Path:
    """Write `state` as the checkpoint of `step`; OSError if the disk will not have it.

    Args:
        state: nested dictionaries and lists of tensors and plain values.
        permitted: raises if the folder has become another process's; asked before the first and the last act.
    """
    permitted()
    label = label or Label()
    final = folder / f"{step:09d}"
    aside = folder / f".{final.name}.{secrets.token_hex(4)}"  # not the process's number, which two hosts may share
    if not folder.exists():
        folder.mkdir()
        _flush_folder(folder.parent)
    aside.mkdir()
    try:
        with open(aside / "state.pt", "wb") as file:
            written = _write({"format": FORMAT, "step": step, **state}, file)
            _flush(file)
        manifest = {"format": FORMAT, "step": step, "top1": label.top1, "lasting": label.lasting}
        manifest |= {"size": written.size, "sha256": written.digest.hexdigest()}
        with open(aside / "manifest.json", "w") as file:
            json.dump(manifest, file)
            _flush(file)
        _flush_folder(aside)
        permitted()
        _put(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def _write(state: dict[str, Any], file: IO[bytes]) -> _Written:
    """Write `state` into `file`; OSError if the disk will not have it, where torch says "unexpected pos"."""
    written = _Written(file)
    try:
        torch.save(state, written)
    except RuntimeError as error:
        raise written.refused or error from error
    return written


def _put(aside: Path, final: Path) -> None:
    """Give the checkpoint at `aside` its name; whatever had it is there, under one name or the other, until then."""
    if final.exists():  # stopped before this step was evaluated, resumed, evaluated: the newer one knows its top-1
        before = final.with_name(f".{final.name}{REPLACED}")
        shutil.rmtree(before, ignore_errors=True)
        os.rename(final, before)
    os.rename(aside, final)
    _flush_folder(final.parent)


def listing(folder: Path) -> list[Found]:
    """The checkpoints of `folder`, oldest first; not yet verified.

    One whose manifest cannot be read is listed too, so that whoever reads it says what is wrong with it.
    """
    paths = list(folder.glob(NAME))
    # Killed between two renames: what was to be replaced is all there is of its step.
    paths += [p for p in folder.glob(f".{NAME}{REPLACED}") if not (folder / p.name[1:10]).exists()]
    return sorted((_found(path) for path in paths), key=lambda f: f.step)


def _found(path: Path) -> Found:
    step = int(path.name.removeprefix(".")[:9])
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        top1 = manifest["top1"]
        return Found(path, step, None if top1 is None else float(top1), bool(manifest.get("lasting", False)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Found(path, step)


def verify(path: Path) -> None:
    """Return if the checkpoint at `path` is whole and of this format; ConfigError says what is wrong with it."""
    state = path / "state.pt"
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        found, step = manifest["format"], manifest["step"]
        size, digest = manifest["size"], manifest["sha256"]
        whole = state.stat().st_size == size and _digest(state) == digest
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not a whole checkpoint: {' '.join(str(error).split())}") from error
    if found != FORMAT:
        raise ConfigError(f"{path} has format {found}, this version reads {FORMAT}: use the version that wrote it")
    if not whole:
        raise ConfigError(f"{state} is damaged: its size or checksum is not that of its manifest")
    if path.name.isdigit() and int(path.name) != step:
        raise ConfigError(f"{path} is the checkpoint of step {step}: give it back its name")


def load(path: Path) -> dict[str, Any]:
    """The state stored at `path`, mapped from the file; ConfigError if it is not a plain state."""
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zipfile, pickle and torch each have their own
        raise ConfigError(f"{path / 'state.pt'} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(state, dict):
        raise ConfigError(f"{path / 'state.pt'} holds a {type(state).__name__}, not the state of a run")
    return state


def newest_whole(folder: Path, accept: Callable[[dict[str, Any]], None] | None = None) -> Path | None:
    """The newest whole checkpoint, None where there is none at all.

    Each one refused on the way is warned of by name. ConfigError where every one is: starting again from nothing in
    silence would be the worst answer.

    Args:
        accept: raises ConfigError for a state that is not this run's.
    """
    refused = []
    for found in reversed(listing(folder)):
        try:
            verify(found.path)
            state = load(found.path)
            if accept is not None:
                _ask(accept, state, found.path)
        except ConfigError as error:
            refused.append(str(error))
            continue
        for reason in refused:
            warn(f"{reason}; falling back to {found.path.name}")
        return found.path
    if not refused:
        return None
    for reason in refused[:-1]:
        warn(reason)
    raise ConfigError(f"no checkpoint in {folder} can be used ({refused[-1]}): restore one, or remove it")


def _ask(accept: Callable[[dict[str, Any]], None], state: dict[str, Any], path: Path) -> None:
    try:
        accept(state)
    except ConfigError as error:
        raise ConfigError(f"{path} does not fit this run: {error}") from error


class _Written:
    """A file that knows the checksum and the size of what was written to it: reading it back would cost as much."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest, self.size = file, hashlib.sha256(), 0
        self.refused: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        self.size += len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.refused = self.refused or error
            raise

    def flush(self) -> None:
        self._file.flush()


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
