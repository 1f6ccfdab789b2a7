"""A data set as a table of rows: where the bytes of each image are, its label, width and height.

`open_index` reads the header of every file once and keeps the table in one flat file, `.imagenet-trainer-index` in the
data folder (a file and not a folder, which torchvision's ImageFolder would take for a class) or, where that cannot be
written, below ~/.cache. Later opens map that file into memory and look only at the class folders.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trainer import environment
from trainer.data import shards
from trainer.data.jpeg import measure_all
from trainer.data.table import CACHE_NAME, DataError, Index, Progress, assemble, load, store

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision
# Threads, to wait for a disk or a server together. Warm files on 2 cores: 16 threads read 32,000 headers a second, one
# thread 57,000 (the interpreter lock), two processes 122,000: ImageNet takes 40 s at worst, not worth the processes.
_THREADS = 16
_CHUNK = 512  # files a thread measures before it reports
_TICK = 20_000_000  # ns; Linux stamps files with a clock that moves every 1 to 10 ms


def open_index(
    folder: str | Path,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    cache_dir: str | Path | None = None,
) -> Index:
    """The table of the images in `folder`/CLASS/**, from the cache where the folders are as they were, else by a scan.

    The same classes, files, labels and order as torchvision's ImageFolder, links to folders followed, except that
    names starting with a dot are ignored. `workers` threads read the headers (default: 16); `progress` is called from
    this thread, during a scan only. `cache_dir` replaces ~/.cache/imagenet-trainer/index, which serves
    where `folder` cannot be written. Any number of processes may open at once, but each would scan: let one go first.

    A file added, removed or renamed is noticed, as each changes the time stamp of its folder. A file replaced is
    noticed where the new one was renamed into place (as rsync and most editors do), not where it was overwritten:
    delete the cache file then. Raises DataError; a scan names the first bad file and counts the others.
    """
    root = _existing(folder)
    return _kept(
        root, CACHE_NAME, partial(_scan, root, workers or _THREADS, progress), partial(_unchanged, root), cache_dir
    )


def open_shards(
    root: str | Path, name: str, *, progress: Progress | None = None, cache_dir: str | Path | None = None
) -> Index:
    """The table of the WebDataset shards `root`/`name`-*.tar, kept as `open_index` keeps a folder's.

    Rows stand as in the shards, in the order of their names. A shard added, removed, or of another size or time stamp
    is noticed. Raises DataError, also for a shard that is cut short.
    """
    folder = _existing(root)
    scan = partial(shards.scan, folder, name, progress)
    return _kept(folder, f"{CACHE_NAME}-{name}", scan, partial(shards.unchanged, folder, name), cache_dir)


def open_split(root: str | Path, names: tuple[str, ...], progress: Progress | None = None) -> Index:
    """The first of `names` that is a folder of class folders or a set of shards NAME-*.tar below `root`."""
    for name in names:
        if shards.shard_files(_existing(root), name):
            return open_shards(root, name, progress=progress)
    return open_index(find_split(root, None, names), progress=progress)


def _kept(root: Path, file: str, scan: Any, unchanged: Any, cache_dir: str | Path | None) -> Index:
    """The index that is kept beside the data or, where that is read-only, in a cache folder; else what `scan` finds."""
    home = Path(cache_dir) if cache_dir is not None else environment.cache("index")
    places = (root / file, home / (hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32] + file))
    for place in places:
        index = load(place, root, unchanged)
        if index is not None:
            return index
    index, stamps = scan()
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            return store(place, index, stamps, unchanged)
        except OSError as error:  # a read-only folder, most often
            reason = error
    warnings.warn(f"the index of {root} could not be kept and is made anew each time: {reason}", stacklevel=3)
    return index


def check_same_classes(train: Index, val: Index) -> None:
    """DataError unless both have the same class folders, so that a label means the same in both."""
    if train.classes == val.classes:
        return
    lacks = []
    for here, there in ((val, train), (train, val)):
        if missing := sorted({*there.classes} - {*here.classes}):
            lacks.append(f"{here.root} lacks {_some(missing)}")
    raise DataError(
        f"{train.root} has {len(train.classes)} classes, {val.root} has {len(val.classes)}: {'; '.join(lacks)}; "
        "labels would not agree: give both the same class folders"
    )


def find_split(root: str | Path, name: str | None, candidates: tuple[str, ...]) -> Path:
    """root/name, or without a name the first of root/candidates that exists; DataError lists what is there instead."""
    base = _existing(root)
    wanted = candidates if name is None else (name,)
    for split in wanted:
        if (base / split).is_dir():
            return base / split
    _, there, _ = _list(base)
    raise DataError(
        f"{base} has no folder {' or '.join(wanted)}; it has {_some(there) if there else 'no folders'}: "
        "name one of its folders as the split, or correct the root"
    )


def _existing(folder: str | Path) -> Path:
    root = Path(os.path.abspath(Path(folder).expanduser()))
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"the data folder {root} {what}: give a folder that holds one folder per class")
    return root


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _list(folder: Path | str) -> tuple[os.stat_result, list[str], list[str]]:
    """A folder's status, then the sorted names of the folders and of the images in it, without the hidden ones.

    The status is older than the names, so that a change in between shows in the next one.
    """
    try:
        status = os.stat(folder)
        if abs(time.time_ns() - status.st_mtime_ns) < _TICK:
            time.sleep(_TICK / 1e9)  # so that no change from here on carries the same time
        with os.scandir(folder) as entries:
            shown = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error.strerror}): make it readable") from None
    folders = sorted(name for name, is_folder in shown if is_folder)
    images = sorted(name for name, is_folder in shown if not is_folder and name.lower().endswith(IMAGE_SUFFIXES))
    return status, folders, images


def _class_folders(root: Path) -> list[str]:
    _, folders, images = _list(root)
    if images:
        count = f"{len(images)} images outside any class folder"
        raise DataError(f"{root} holds {count}, {images[0]} first: move them to the folder of their class")
    if not folders:
        raise DataError(f"{root} has no class folders: it must hold one folder per class, with the images in it")
    return folders


def _walk(root: Path, name: str) -> tuple[dict[str, int], list[str]]:
    """The folders of a class with their time stamps, and its files in ImageFolder's order; all relative to the root."""
    stamps: dict[str, int] = {}
    found: list[tuple[str, list[str]]] = []
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [(name, ())]
    while pending:
        folder, above = pending.pop()
        status, folders, images = _list(f"{root}/{folder}")
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise DataError(f"{root}/{folder} is a link to a folder that holds it: remove the link")
        stamps[folder] = status.st_mtime_ns
        found.append((folder, [f"{folder}/{image}" for image in images]))
        pending += [(f"{folder}/{inner}", (*above, identity)) for inner in folders]
    return stamps, [file for _, files in sorted(found) for file in files]


def _scan(root: Path, workers: int, progress: Progress | None) -> tuple[Index, dict[str, int]]:
    """The index by reading every header, and the time stamps of all folders."""
    names = _class_folders(root)
    with ThreadPoolExecutor(workers) as pool:
        stamps, files, counts = {}, [], []
        for folders, images in pool.map(lambda name: _walk(root, name), names):
            stamps |= folders
            files += images
            counts.append(len(images))
        empty = [name for name, count in zip(names, counts) if not count]
        if empty:
            more = f" and {len(empty) - 1} more class folders have" if len(empty) > 1 else " has"
            raise DataError(f"{root / empty[0]}{more} no images ({', '.join(IMAGE_SUFFIXES)}): fill or remove them")
        rows, bad = [], []
        parts = [files[at : at + _CHUNK] for at in range(0, len(files), _CHUNK)]
        for measured, wrong in pool.map(lambda part: measure_all(root, part), parts):
            rows += measured
            bad += wrong
            if progress is not None:
                progress(len(rows), len(files))
    if bad:
        more = f" ({len(bad) - 1} more files are bad)" if len(bad) > 1 else ""
        raise DataError(f"{root / bad[0][0]} {bad[0][1]}{more}: repair or remove, then run again")
    if not _unchanged(root, tuple(names), stamps):
        raise DataError(f"{root} changed while it was read: wait until nothing writes there, then run again")
    labels = np.repeat(np.arange(len(names)), counts)
    return assemble(root, tuple(names), labels, np.asarray(rows, np.int64), files), stamps


def _unchanged(root: Path, classes: tuple[str, ...], stamps: dict[str, Any]) -> bool:
    """Whether no folder's content changed: one stat for each folder, none for a file."""
    if tuple(_class_folders(root)) != classes:
        return False
    try:
        return all(os.stat(f"{root}/{folder}").st_mtime_ns == stamp for folder, stamp in stamps.items())
    except OSError:
        return False
