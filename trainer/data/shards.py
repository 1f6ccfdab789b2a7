"""Reading WebDataset shards: tar files of KEY.jpg (or another image suffix) and KEY.cls pairs.

Tar members are stored as they are, so an image is `size` bytes at a position in the shard: no member is ever extracted.
"""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.data.jpeg import BadImage, measure
from trainer.data.prepare import run_jobs
from trainer.data.table import DataError, Index, Progress, assemble

SUFFIXES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "tif", "tiff")
_SMALL = 256 << 20  # bytes
CLASS_FILE = "class_index.json"  # {"0": ["n01440764", "tench"], ...}


class Row(NamedTuple):
    """One sample of a shard."""

    key: str
    label: int
    width: int
    height: int
    size: int
    position: int


def shard_files(root: Path, name: str) -> list[Path]:
    """The shards of split `name` in the order of their names."""
    return sorted(root.glob(f"{name}-*.tar"))


def scan(root: Path, name: str, progress: Progress | None) -> tuple[Index, dict[str, Any]]:
    """(the index of the shards by reading every member's header, what `unchanged` compares); DataError if unsound."""
    files = shard_files(root, name)
    stamps = _stamps(files)
    found: list[list[Row]] = []
    # Starting processes takes seconds, reading the headers of a small set none.
    workers = 1 if sum(file.stat().st_size for file in files) < _SMALL else None
    for rows in run_jobs(read_shard, [str(file) for file in files], workers):
        found.append(rows)
        if progress is not None:
            progress(len(found), len(files))
    counts = [len(rows) for rows in found]
    rows = [row for shard in found for row in shard]
    if not rows:
        raise DataError(f"{root}/{name}-*.tar hold no images: each sample is KEY.jpg and KEY.cls")
    classes = class_names(root, max(row.label for row in rows) + 1)
    table = np.array([row[1:] for row in rows], np.int64)
    paths = [f"{file.name}/{row.key}" for file, shard in zip(files, found) for row in shard]
    where = tuple(file.name for file in files), np.repeat(np.arange(len(files)), counts), table[:, 4]
    return assemble(root, classes, table[:, 0], table[:, 1:4], paths, where), stamps


def unchanged(root: Path, name: str, classes: tuple[str, ...], stamps: dict[str, Any]) -> bool:
    """Whether the shards are those of `stamps`: one stat each."""
    return _stamps(shard_files(root, name)) == stamps


def class_names(root: Path, at_least: int) -> tuple[str, ...]:
    """The classes by label from class_index.json; names made of the numbers where there is no such file."""
    path = root / CLASS_FILE
    if not path.exists():
        return tuple(f"class{label:04d}" for label in range(at_least))
    try:
        table = json.loads(path.read_text())
        names = tuple(table[str(label)][0] for label in range(len(table)))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(
            f'{path} is not {{"0": ["WNID", "words"], ...}} without a gap: {error!r}; make it anew'
        ) from error
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path} gives the name {twice} to two classes: rename one")
    if at_least > len(names):
        raise DataError(
            f"{root} has label {at_least - 1}, but {path} names {len(names)} classes: make one fit the other"
        )
    return names


def read_shard(path: str) -> list[Row]:
    """The samples of one shard in their order; DataError if it is cut short or holds what cannot be trained on."""
    images: dict[str, tuple[int, int, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, suffix = member.name.rpartition(".")
                if not member.isfile() or suffix not in (*SUFFIXES, "cls"):
                    continue
                content = tar.extractfile(member)
                if suffix == "cls":
                    labels[key] = _label(path, member.name, content.read())
                    continue
                try:
                    images[f"{key}.{suffix}"] = (*measure(content), member.offset_data)
                except BadImage as error:
                    raise DataError(f"{path}: {member.name} {error}: repair or remove it, then run again") from None
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path} is cut short or no tar file ({error}): copy or make it again") from None
    # tarfile takes the end of a file for the end of an archive; a whole one ends with a block of zeros.
    if os.path.getsize(path) < end + 512:
        raise DataError(f"{path} is cut short (it has no end-of-archive block): copy or make it again")
    missing = [name for name in images if name.rpartition(".")[0] not in labels]
    if missing:
        raise DataError(
            f"{path}: {missing[0]} has no label ({missing[0].rpartition('.')[0]}.cls): make the shard again"
        )
    return [Row(name, labels[name.rpartition(".")[0]], *where) for name, where in images.items()]


def _label(path: str, name: str, content: bytes) -> int:
    try:
        label = int(content)
    except ValueError:
        label = -1
    if label < 0:
        raise DataError(f"{path}: {name} holds {content[:20]!r}, not a label from 0 on: make the shard again")
    return label


def _stamps(files: list[Path]) -> dict[str, list[int]]:
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
