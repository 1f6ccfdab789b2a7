"""The two destinations. Whatever has its final name is whole: everything is written aside, below .prepare, and renamed.

Both can do a unit of work again and end with the same bytes in the same places; that is all that resuming needs.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.data.index import DataError
from trainer.data.prepare.transcode import suffix_of

ASIDE = ".prepare"
_BLOCK = tarfile.BLOCKSIZE
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_CHUNK = 8 << 20
_SEED = 20120  # of the order in which shards take turns; a shard's content must not change between two starts


class Item(NamedTuple):
    """An image as it goes into the destination."""

    label: int
    name: str
    data: bytes


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turns what the system says while the destination is written into one line."""
    try:
        yield
    except OSError as error:
        reason = _FULL.get(error.errno)
        remedy = "free some space" if reason else "correct that"
        raise DataError(
            f"{place} cannot be written: {reason or error.strerror or error}; nothing there is damaged: {remedy} and "
            "run the same command again, it goes on from here"
        ) from None


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """All of `data` at an offset of a file; OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def write_file(path: Path, data: bytes, aside: Path) -> None:
    """A whole file or none: written to `aside`, on the same disk, then renamed. OSError."""
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_at(descriptor, data, 0)
    finally:
        os.close(descriptor)
    os.replace(aside, path)


def write_json(path: Path, value: object, home: Path, indent: int | None = None) -> None:
    """A JSON file, whole or not at all, in the folder `home` or below it."""
    with writing(home):
        write_file(path, (json.dumps(value, indent=indent) + "\n").encode(), home / ASIDE / f"{path.name}.new")


def read_json(path: Path) -> dict[str, object]:
    """What `write_json` wrote; DataError where it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): remove {path.parent.parent} and run again") from None


def write_images(home: Path, split: str, classes: tuple[str, ...], items: list[Item]) -> None:
    """Images into home/split/CLASS/NAME; any number of processes may do so at once."""
    aside = home / ASIDE / str(os.getpid())
    with writing(home):
        for item in items:
            folder = home / split / classes[item.label]
            path = folder / item.name.replace("/", "__")
            try:
                write_file(path, item.data, aside)
            except FileNotFoundError:
                folder.mkdir(parents=True, exist_ok=True)
                write_file(path, item.data, aside)


def check_images(home: Path, split: str, classes: tuple[str, ...], counts: list[int], sizes: list[int]) -> None:
    """DataError unless each class folder holds `counts` files of `sizes` bytes together, and nothing else is there."""
    folder = home / split
    there = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
    if strange := sorted(there - set(classes)):
        raise DataError(f"{folder / strange[0]} was not made by this command: remove it, then run again")
    for name, count, size in zip(classes, counts, sizes):
        found = [entry.stat().st_size for entry in os.scandir(folder / name)] if name in there else []
        if (len(found), sum(found)) != (count, size):
            raise DataError(
                f"{folder / name} holds {len(found)} files of {sum(found):,} bytes, written were {count} of {size:,}: "
                f"two images had one name, or files were lost or added since; remove {home} and run again"
            )


@dataclass
class Shards:
    """The tar shards of one split, filled in turns, so that every shard holds a fair draw of the whole split.

    Image number i goes to shard P[i % n] where P is a permutation of the n shards, a new one every n images. So shards
    differ by at most one image, and the classes mix although the source is read in its own order, which is also the
    order within a shard: a reader that shuffles the shards and buffers about one of them is well mixed.
    """

    split: str
    number: int
    samples: int = 0
    ends: list[int] = field(default_factory=list)  # bytes in each shard so far
    checks: list[int] = field(default_factory=list)  # CRC-32 of them: hashes that can be kept cannot be continued

    def __post_init__(self) -> None:
        self.ends = self.ends or [0] * self.number
        self.checks = self.checks or [0] * self.number

    def name(self, shard: int) -> str:
        return f"{self.split}-{shard:06}.tar"

    def turn(self, sample: int) -> int:
        """The shard of image number `sample` of the split."""
        again, place = divmod(sample, self.number)
        if again != getattr(self, "_again", None):
            key = [_SEED + (self.split == "train"), again]
            self._again, self._order = again, np.random.Generator(np.random.Philox(key=key)).permutation(self.number)
        return int(self._order[place])

    def add(self, home: Path, items: list[Item]) -> None:
        """Put images at the ends of their shards. This object is unchanged where that fails: do it again later."""
        texts: dict[int, list[bytes]] = {}
        for at, item in enumerate(items, self.samples):
            # A number makes the key unique; no dots, where WebDataset begins the suffix.
            stem = re.sub(r"[^A-Za-z0-9_-]", "_", os.path.splitext(os.path.basename(item.name))[0])[:64]
            key = f"{self.split}_{at:08}_{stem}"
            members = ((suffix_of(item.name, item.data), item.data), ("cls", b"%d" % item.label))
            for suffix, data in members:
                texts.setdefault(self.turn(at), []).append(_member(f"{key}.{suffix}", data))
        joined = {shard: b"".join(parts) for shard, parts in texts.items()}
        with writing(home):
            for shard, text in joined.items():
                self._write(home, shard, text)
        for shard, text in joined.items():
            self.ends[shard] += len(text)
            self.checks[shard] = zlib.crc32(text, self.checks[shard])
        self.samples += len(items)

    def _write(self, home: Path, shard: int, text: bytes) -> None:
        descriptor = os.open(home / ASIDE / self.name(shard), os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            write_at(descriptor, text, self.ends[shard])
        finally:
            os.close(descriptor)

    def counts(self) -> list[int]:
        """Images in each shard."""
        whole, rest = divmod(self.samples, self.number)
        counts = [whole] * self.number
        for sample in range(self.samples - rest, self.samples):
            counts[self.turn(sample)] += 1
        return counts

    def finishing(self, home: Path) -> list[Finish]:
        """A job for `finish` for each shard."""
        everything = zip(self.ends, self.checks, self.counts())
        return [Finish(str(home), self.name(at), *values) for at, values in enumerate(everything)]


@dataclass(frozen=True)
class Finish:
    """A shard that has all its images: its bytes without the end marker, their CRC-32, and its images."""

    home: str
    name: str
    end: int
    check: int
    samples: int


def finish(job: Finish) -> dict[str, object]:
    """End a shard, read it back, give it its name; returns its line in the index. Doing it again changes nothing."""
    home = Path(job.home)
    aside, path = home / ASIDE / job.name, home / job.name
    with writing(home):
        if not path.exists():
            aside.touch()  # a shard that got no image
        if aside.exists():
            with open(aside, "r+b") as file:
                file.truncate(job.end)  # behind it may lie what a stopped run wrote and this one wrote elsewhere
                file.truncate(job.end + 2 * _BLOCK)
                os.fsync(file.fileno())
        place = aside if aside.exists() else path
        check, digest, left = 0, hashlib.sha256(), job.end
        with open(place, "rb") as file:
            while data := file.read(_CHUNK):
                digest.update(data)
                check = zlib.crc32(data[:left], check)
                left -= min(left, len(data))
            size = file.tell()
        if (check, size) != (job.check, job.end + 2 * _BLOCK):
            raise DataError(f"{place} is not what was written (a disk or power failure?): remove {home} and run again")
        if aside.exists():
            os.replace(aside, path)
    return {"name": job.name, "samples": job.samples, "bytes": size, "sha256": digest.hexdigest()}


def check_shards(home: Path, split: str) -> None:
    """DataError unless the shards in home/SPLIT.index.json are there with their sizes."""
    index = home / f"{split}.index.json"
    try:
        shards = json.loads(index.read_text())["shards"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{index} cannot be read ({error}): remove {home} and run again") from None
    for shard in shards:
        path = home / shard["name"]
        size = path.stat().st_size if path.is_file() else 0
        if size != shard["bytes"]:
            raise DataError(f"{path} has {size:,} bytes instead of {shard['bytes']:,}: remove {home} and run again")


def kept(shards: Shards) -> dict[str, object]:
    """What a resumed run needs of them, for JSON."""
    return asdict(shards)


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % _BLOCK)
