"""Copying a data set to a disk of the node, or into its memory, before training.

A staged set is the index of the source with another root: rows, their order and the digest are the same, so is the run.
Each set has a folder of its own in `stage_to`, named after where it came from, what its index says and the time stamps
of the source, so a changed source is staged anew and never pulls files from under a job that reads the old ones. Files
are copied aside and renamed: whatever has its final name is whole, and a stopped staging goes on with the others.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from trainer.data.prepare.pace import Progress
from trainer.data.room import room
from trainer.data.table import DataError, Index

_LOCK = ".staging.lock"
_THREADS = 8  # to keep a server busy; hashing and copying let go of the interpreter
_PART = 256  # files of a folder that a thread copies before it reports
_CHUNK = 8 << 20  # bytes
_BLOCK = 4096  # a file takes whole blocks


def stage(
    indexes: Sequence[Index], folder: str | Path, reserve: float, progress: Progress | None = None
) -> list[Index]:
    """The same indexes over copies of their files below `folder`, which are made unless they are there and whole.

    Any number of processes may call it at once: one copies, the others wait for it. A reused file has the size that it
    should have; the copied one had it too, and the sha256 that `prepare` wrote, where it wrote one.

    Args:
        reserve: bytes that stay free in `folder`; DataError before anything is copied where they would not.
        progress: called with (what, bytes done, of bytes, images done); what an earlier run copied counts as done.

    Raises DataError: no room, a source that cannot be read or is not what it was, a folder that cannot be written.
    """
    copies = [_Copy(index, Path(os.path.abspath(Path(folder).expanduser()))) for index in indexes]
    if any(len(copy.missing()) for copy in copies):
        with _locked(copies[0].folder):
            todo = [(copy, copy.missing()) for copy in copies]
            _check_room(todo, reserve)
            for copy, missing in todo:
                copy.make(missing, reserve, progress)
    return [replace(copy.index, root=copy.home) for copy in copies]


class _Full(Exception):
    """The folder is down to its reserve."""


class _Copy:
    """The files of one index, numbered from 0, here and there."""

    def __init__(self, index: Index, folder: Path) -> None:
        self.index, self.folder = index, folder
        self.names, stamps = _sharded(index) if index.shard_files else _foldered(index)
        if index.shard_files:
            self.sizes = np.array([size for _, size, _ in stamps])
            self.images = np.bincount(index.shards, minlength=len(self.names))
        else:
            self.sizes, self.images = index.sizes, np.ones(len(self.names), np.int64)
        identity = json.dumps([str(index.root.resolve()), index.digest, stamps])
        self.home = folder / f"{index.root.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    def missing(self) -> np.ndarray:
        """The numbers of the files that have yet to be copied."""
        here = (_size(self.home / name) for name in self.names)
        return np.flatnonzero(np.fromiter(here, np.int64, len(self.names)) != self.sizes)

    def make(self, missing: np.ndarray, reserve: float, progress: Progress | None) -> None:
        """Copy what is missing; where there is no room for it, leave nothing."""
        checks = _checksums(self.index)
        try:
            for name in {os.path.dirname(self.names[number]) for number in missing}:
                (self.home / name).mkdir(parents=True, exist_ok=True)
            for left in self.home.rglob(".*.part"):  # by a run that was killed
                left.unlink()
        except OSError as error:
            raise _unwritable(self.home, error) from None
        step = 1 if self.index.shard_files else _PART
        parts = [missing[at : at + step] for at in range(0, len(missing), step)]
        total, done = int(self.sizes.sum()), int(self.sizes.sum() - self.sizes[missing].sum())
        images = int(self.images.sum() - self.images[missing].sum())

        def work(part: np.ndarray) -> None:
            for number in part:
                self._one(number, reserve, checks.get(self.names[number]))

        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                for part, _ in zip(parts, pool.map(work, parts)):
                    done, images = done + int(self.sizes[part].sum()), images + int(self.images[part].sum())
                    if progress is not None:
                        progress(f"staging {self.index.root}", done, total, images)
            except _Full:
                pool.shutdown(cancel_futures=True)
                shutil.rmtree(self.home, ignore_errors=True)  # of no use to anyone, and in the way of others
                raise DataError(
                    f"data.stage_to={self.folder} was filled by something else while {self.index.root} "
                    f"({_gb(total)}) was staged; its copy is removed: free some space, or leave data.stage_to out"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)

    def _one(self, number: int, reserve: float, check: str | None) -> None:
        """One file, whole or not at all."""
        name, size = self.names[number], int(self.sizes[number])
        source, target = self.index.root / name, self.home / name
        if room(self.folder) < size + reserve:
            raise _Full
        aside = target.with_name(f".{target.name}.part")
        digest, copied = hashlib.sha256(), 0
        try:
            with open(aside, "wb") as file:
                for chunk in _chunks(source):
                    if check:
                        digest.update(chunk)
                    copied += file.write(chunk)
                if size >= _CHUNK:
                    os.fsync(file.fileno())  # not for each of a million small ones
            if copied != size:
                raise DataError(
                    f"{source} has {copied:,} bytes, not {size:,} as when the set was indexed: wait until nothing "
                    "writes there, or put it right, then run again"
                )
            if check and digest.hexdigest() != check:
                raise DataError(f"{source} is not what prepare wrote (its sha256 differs): copy or make it again")
            os.replace(aside, target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _Full from None
            raise _unwritable(target, error) from None
        finally:
            aside.unlink(missing_ok=True)


def _sharded(index: Index) -> tuple[list[str], list]:
    """The shards, and their sizes and time stamps."""
    found = [(name, os.stat(index.root / name)) for name in index.shard_files]
    return list(index.shard_files), [[name, status.st_size, status.st_mtime_ns] for name, status in found]


def _foldered(index: Index) -> tuple[list[str], list]:
    """The images, and the time stamps of their folders: a folder's changes with every file that comes or goes."""
    prefix = len(str(index.root)) + 1
    names = [path[prefix:] for path in index.paths(np.arange(len(index)))]
    folders = sorted({os.path.dirname(name) for name in names})
    return names, [[name, os.stat(index.root / name).st_mtime_ns] for name in folders]


def _checksums(index: Index) -> dict[str, str]:
    """The sha256 of each shard where `prepare` has written SPLIT.index.json beside them."""
    found = {}
    for split in {name.rpartition("-")[0] for name in index.shard_files}:
        path = index.root / f"{split}.index.json"
        try:
            found |= {shard["name"]: shard["sha256"] for shard in json.loads(path.read_text())["shards"]}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error!r}): make it again with prepare, or remove it") from None
    return found


def _check_room(todo: Sequence[tuple[_Copy, np.ndarray]], reserve: float) -> None:
    """DataError unless all that is missing fits."""
    folder = todo[0][0].folder
    need = sum(int((-(-copy.sizes[missing] // _BLOCK) * _BLOCK).sum()) for copy, missing in todo)
    free = room(folder)
    if need and free < need + reserve:
        raise DataError(
            f"data.stage_to={folder} has {_gb(free)} free, the set needs {_gb(need)} there, and {_gb(reserve)} are to "
            "stay free (data.stage_reserve_gb): free some space, choose another folder, or leave data.stage_to out"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time copies into `folder`; the system lets go of the lock however that process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / _LOCK, os.O_RDONLY | os.O_CREAT, 0o644)  # another user's does as well
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            warnings.warn(f"another process copies into {folder}: waiting for it to end", stacklevel=4)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): correct that, then run again") from None


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"data.stage_to: {path} cannot be written ({error.strerror}): correct that, or choose another")


def _size(path: Path) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"
