"""The table behind a data set, and the one flat file that it is kept in.

The file: one line of magic, the length of the header as 8 bytes, the header in JSON, then the columns, each at a
multiple of 64 bytes. Later opens map it into memory. All paths in it are relative to the data: it may be copied along.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import ConfigError

CACHE_NAME = ".imagenet-trainer-index"
_MAGIC = b"imagenet-trainer index 2\n"  # the number rises when the layout or the meaning of a column changes
_COLUMNS = {
    "labels": "<i4",
    "widths": "<i4",
    "heights": "<i4",
    "sizes": "<i8",
    "offsets": "<i8",
    "names": "|u1",
    "shards": "<i4",
    "positions": "<i8",
}
_ALIGN = 64

Progress = Callable[[int, int], None]  # called with (files done, files in all)
Unchanged = Callable[[tuple[str, ...], dict[str, Any]], bool]


class DataError(ConfigError):
    """The user's mistake in the data: one line that names the file or folder, what is wrong and the remedy."""


@dataclass(frozen=True, eq=False)
class Index:
    """n images: of a folder, one file each, in the order of torchvision's ImageFolder; or of tar shards, in theirs.

    Arrays may be mapped from a file: read-only. `shards` and `positions` are empty for a folder.
    """

    root: Path
    classes: tuple[str, ...]  # folder names, sorted; a label is a position in it
    labels: np.ndarray  # int32 (n,)
    widths: np.ndarray  # int32 (n,), pixels as stored: EXIF orientation ignored
    heights: np.ndarray  # int32 (n,)
    sizes: np.ndarray  # int64 (n,), bytes
    offsets: np.ndarray  # int64 (n + 1,): row i's path below root is names[offsets[i] : offsets[i + 1]]
    names: np.ndarray  # uint8
    shards: np.ndarray  # int32 (n,): which of shard_files
    positions: np.ndarray  # int64 (n,): where in it the image's bytes begin
    digest: str  # sha256, hex, over the classes and all columns, not root: equal wherever the same data lie
    shard_files: tuple[str, ...] = ()  # relative to root

    def __post_init__(self) -> None:
        object.__setattr__(self, "_mapped", {})  # shards that are open, by number

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, row: int) -> str:
        """The absolute path of one row; IndexError outside 0 .. n-1."""
        return self.paths(np.asarray([row]))[0]

    def encoded(self, rows: np.ndarray) -> list[np.ndarray]:
        """The files' bytes of `rows` of a sharded set: uint8 views of the mapped shards, read when they are touched."""
        assert self.shard_files, "a folder's files are read by their paths"
        where = zip(self.shards[rows].tolist(), self.positions[rows].tolist(), self.sizes[rows].tolist())
        return [self._shard(shard)[begin : begin + size] for shard, begin, size in where]

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._mapped:
            self._mapped[number] = np.memmap(self.root / self.shard_files[number], np.uint8, "r")
        return self._mapped[number]

    def paths(self, rows: np.ndarray) -> list[str]:
        """The absolute paths of `rows` (integers, any order); IndexError for a row outside 0 .. n-1."""
        rows = np.asarray(rows, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of a data set with {len(self)} images")
        prefix, names = os.fsencode(self.root) + b"/", self.names.data
        spans = zip(self.offsets[rows].tolist(), self.offsets[rows + 1].tolist())
        return [os.fsdecode(prefix + bytes(names[begin:end])) for begin, end in spans]


def assemble(
    root: Path,
    classes: tuple[str, ...],
    labels: np.ndarray,
    rows: np.ndarray,
    files: Iterable[str],
    shards: tuple[tuple[str, ...], np.ndarray, np.ndarray] = ((), np.empty(0), np.empty(0)),
) -> Index:
    """An Index out of labels (n,), rows (n, 3) of width, height, bytes, and n relative paths.

    Args:
        shards: the shard files, and for each row which of them (n,) and its position in it (n,).
    """
    encoded = [os.fsencode(file) for file in files]
    columns = {
        "labels": labels,
        "widths": rows[:, 0],
        "heights": rows[:, 1],
        "sizes": rows[:, 2],
        "offsets": np.concatenate([[0], np.cumsum([len(name) for name in encoded])]),
        "names": np.frombuffer(b"".join(encoded), np.uint8),
        "shards": shards[1],
        "positions": shards[2],
    }
    columns = {name: np.ascontiguousarray(column, _COLUMNS[name]) for name, column in columns.items()}
    digest = hashlib.sha256(json.dumps([classes, shards[0]]).encode())
    for column in columns.values():
        digest.update(column.data)
    return Index(root, classes, **columns, digest=digest.hexdigest(), shard_files=shards[0])


def store(place: Path, index: Index, stamps: dict[str, Any], unchanged: Unchanged) -> Index:
    """Write the file aside, rename it into place, and open it; where another process was first, open its file.

    Args:
        stamps: what tells whether the data are still those of the index, in JSON's types.
        unchanged: (classes, stamps) to whether they are.
    """
    lengths = {name: len(getattr(index, name)) for name in _COLUMNS}
    head = {"classes": index.classes, "stamps": stamps, "digest": index.digest, "lengths": lengths}
    head["shards"] = index.shard_files
    text = json.dumps(head).encode()
    aside = place.with_name(f"{place.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with open(aside, "xb") as file:
            file.write(_MAGIC + len(text).to_bytes(8, "little") + text)
            for name in _COLUMNS:
                file.write(bytes(-file.tell() % _ALIGN))
                file.write(getattr(index, name).data)
            file.flush()
            os.fsync(file.fileno())
        # A file that is in use elsewhere is not replaced for nothing: over NFS that would pull it from under a mapping.
        winner = load(place, index.root, unchanged)
        if winner is not None:
            return winner
        os.replace(aside, place)
    finally:
        aside.unlink(missing_ok=True)
    return load(place, index.root, unchanged) or index


def load(place: Path, root: Path, unchanged: Unchanged) -> Index | None:
    """The index in a cache file; None where there is none, it is damaged, or the data changed since."""
    columns = {}
    try:
        raw = np.memmap(place, np.uint8, "r")
        at = len(_MAGIC) + 8
        if raw[: len(_MAGIC)].tobytes() != _MAGIC:
            return None
        end = at + int.from_bytes(raw[at - 8 : at].tobytes(), "little")
        head = json.loads(raw[at:end].tobytes())
        for name, length in head["lengths"].items():
            begin = end + -end % _ALIGN
            columns[name] = np.frombuffer(raw, _COLUMNS[name], length, begin)
            end = begin + columns[name].nbytes
    except (OSError, ValueError):  # missing, not ours to read, empty, cut short
        return None
    classes = tuple(head["classes"])
    if not unchanged(classes, head["stamps"]):
        return None
    return Index(root, classes, **columns, digest=head["digest"], shard_files=tuple(head["shards"]))
