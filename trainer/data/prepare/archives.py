"""The official ILSVRC2012 archives, read in place: each image once, in order, by any number of processes."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from trainer.data.index import DataError
from trainer.data.prepare.matfile import Synset, read_synsets
from trainer.data.prepare.samples import UNIT_BYTES, Sample, Source, Unit, first_repeated, some

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
_TRUTH, _META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
_BLOCK = tarfile.BLOCKSIZE
_EXTRA = frozenset((b"x", b"g", b"L", b"K"))  # headers that describe the next member; nothing here depends on them


@dataclass(frozen=True)
class Member:
    """A file in a tar: `offset` is where its bytes begin, `size` their number."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class TrainPart:
    """A share of one class: the members that begin in slice `part` of `parts` of an inner tar."""

    split: str
    archive: str
    inner: Member
    part: int
    parts: int
    label: int

    @property
    def weight(self) -> int:
        return self.inner.size // self.parts

    def weigh(self, sample: Sample) -> int:
        return _weigh(sample)

    def samples(self) -> Iterator[Sample]:
        begin, end = self.inner.offset, self.inner.offset + self.inner.size
        with open(self.archive, "rb", buffering=0) as file:
            for member in members(file, f"{self.archive}: {self.inner.name}", begin, end):
                if (member.offset - _BLOCK - begin) * self.parts // self.inner.size == self.part:
                    yield Sample(self.label, os.path.basename(member.name), _read(file, member))


@dataclass(frozen=True)
class ValPart:
    """Some members of the flat archive with their labels."""

    split: str
    archive: str
    members: tuple[Member, ...]
    labels: tuple[int, ...]

    @property
    def weight(self) -> int:
        return sum(member.size + 2 * _BLOCK for member in self.members)

    def weigh(self, sample: Sample) -> int:
        return _weigh(sample)

    def samples(self) -> Iterator[Sample]:
        with open(self.archive, "rb", buffering=0) as file:
            for member, label in zip(self.members, self.labels):
                yield Sample(label, os.path.basename(member.name), _read(file, member))


def ilsvrc(root: Path) -> Source:
    """The set out of ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz in `root`."""
    for name, what in ((TRAIN, "the training images"), (VAL, "the validation images")):
        if not (root / name).is_file():
            raise DataError(f"{root} lacks {name} ({what}): put it beside the other archives")
    truth, synsets = _devkit(root)
    classes = sorted(synset.wnid for synset in synsets)
    if twice := first_repeated(classes):
        raise DataError(f"{root / DEVKIT}: meta.mat has the class {twice} twice: download it again")
    wnids = {synset.number: synset.wnid for synset in synsets}
    words = {synset.wnid: synset.words for synset in synsets}
    labels = {name: label for label, name in enumerate(classes)}
    if strange := [number for number in truth if number not in wnids]:
        raise DataError(
            f"{root / DEVKIT}: the ground truth holds class {strange[0]}, which meta.mat lacks: download it again"
        )
    units: list[Unit] = _train_units(root / TRAIN, labels)
    units += _val_units(root / VAL, [labels[wnids[number]] for number in truth])
    expected = {"val": [0] * len(classes)}
    for number in truth:
        expected["val"][labels[wnids[number]]] += 1
    layout = "the official ILSVRC2012 archives"
    all_words = tuple(words[name] for name in classes)
    return Source(layout, root, tuple(classes), all_words, tuple(units), expected, official=len(classes) == 1000)


def members(file: BinaryIO, name: str, begin: int, end: int) -> Iterator[Member]:
    """The files of the tar between two offsets of an open file; DataError where it is cut short or damaged."""
    at = begin
    while True:
        head = os.pread(file.fileno(), _BLOCK, at)
        if len(head) < _BLOCK or at + _BLOCK > end:
            raise DataError(f"{name} is cut short (at byte {at - begin:,}, before its end marker): download it again")
        if not any(head):
            return
        try:
            info = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise DataError(f"{name} is damaged at byte {at - begin:,} ({error}): download it again") from None
        at += _BLOCK
        if at + info.size > end:
            raise DataError(f"{name} is cut short in {info.name} (at byte {end - begin:,}): download it again")
        if info.type not in _EXTRA and info.isreg():
            yield Member(info.name, at, info.size)
        at += info.size + -info.size % _BLOCK


def _read(file: BinaryIO, member: Member) -> bytes:
    data = os.pread(file.fileno(), member.size, member.offset)
    while len(data) < member.size:
        more = os.pread(file.fileno(), member.size - len(data), member.offset + len(data))
        if not more:
            raise DataError(f"{file.name} became shorter while it was read: leave it alone, then run again")
        data += more
    return data


def _weigh(sample: Sample) -> int:
    return len(sample.data) + 2 * _BLOCK  # its header, and padding on average


def _train_units(archive: Path, labels: dict[str, int]) -> list[Unit]:
    with open(archive, "rb", buffering=0) as file:
        inner = list(members(file, str(archive), 0, archive.stat().st_size))
    names = [os.path.basename(member.name).removesuffix(".tar") for member in inner]
    if twice := first_repeated(names):
        raise DataError(f"{archive} holds {twice}.tar twice: download it again")
    if lone := sorted(set(names) ^ set(labels)):
        lacks = lone[0] in labels
        what = f"lacks {lone[0]}.tar" if lacks else f"holds {lone[0]}, which the devkit does not know"
        raise DataError(
            f"{archive} {what}: it has {len(names)} classes, the devkit {len(labels)} ({some(lone)} differ); "
            "download the one that is wrong again"
        )
    units = []
    for name, member in zip(names, inner):
        parts = max(1, member.size // UNIT_BYTES)
        units += [TrainPart("train", str(archive), member, part, parts, labels[name]) for part in range(parts)]
    return units


def _val_units(archive: Path, truth: list[int]) -> list[Unit]:
    """`truth`: the label of image number 1, 2, ..."""
    with open(archive, "rb", buffering=0) as file:
        found = list(members(file, str(archive), 0, archive.stat().st_size))
    if len(found) != len(truth):
        raise DataError(
            f"{archive} holds {len(found):,} images, the devkit's ground truth {len(truth):,} lines: "
            "they do not belong together; download the one that is wrong again"
        )
    labels = []
    for member in found:
        number = re.fullmatch(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG", member.name)
        if not number or not 1 <= int(number[1]) <= len(truth):
            raise DataError(
                f"{archive} holds {member.name}, not ILSVRC2012_val_00000001.JPEG to {len(truth):08}: download it again"
            )
        labels.append(truth[int(number[1]) - 1])
    if twice := first_repeated([member.name for member in found]):
        raise DataError(f"{archive} holds {twice} twice: download it again")
    units, begin, size = [], 0, 0
    for at, member in enumerate(found, 1):
        size += member.size
        if size >= UNIT_BYTES or at == len(found):
            units.append(ValPart("val", str(archive), tuple(found[begin:at]), tuple(labels[begin:at])))
            begin, size = at, 0
    return units


def _devkit(root: Path) -> tuple[list[int], list[Synset]]:
    """The ground truth (an ILSVRC2012_ID for each validation image) and the classes; unpacked or not."""
    archive = root / DEVKIT
    folder = root / DEVKIT.removesuffix(".tar.gz")
    parts: dict[str, bytes] = {}
    if folder.is_dir():
        parts = {name: (folder / name).read_bytes() for name in (_TRUTH, _META) if (folder / name).is_file()}
    elif archive.is_file():
        try:
            with tarfile.open(fileobj=io.BytesIO(archive.read_bytes()), mode="r:gz") as tar:
                for info in tar:
                    for name in (_TRUTH, _META):
                        if info.isreg() and info.name.endswith("/" + name):
                            parts[name] = tar.extractfile(info).read()
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(f"{archive} is cut short or damaged ({error}): download it again") from None
    else:
        raise DataError(
            f"{root} lacks {DEVKIT} (the labels of the validation images and the names of the classes): "
            "put it beside the other archives"
        )
    place = folder if folder.is_dir() else archive
    for name in (_TRUTH, _META):
        if name not in parts:
            raise DataError(f"{place} lacks {name}: download {DEVKIT} again")
    try:
        truth = [int(line) for line in parts[_TRUTH].split()]
    except ValueError as error:
        raise DataError(f"{place}: the ground truth is not one number a line ({error}): download it again") from None
    try:
        return truth, read_synsets(parts[_META])
    except ValueError as error:
        raise DataError(f"{place}: meta.mat {error}: download it again") from None
