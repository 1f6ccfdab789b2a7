"""What every source becomes: classes, and units of work, each of which a process can read by itself.

A unit has `split`, `weight` and `samples()`, is small when pickled, and reads its part of the source once, in order.
Its weight is in whatever its source knows without reading images (images, or bytes of an archive); `weigh(sample)` is
the share of one sample.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

SPLITS = ("train", "val")
UNIT_FILES = 256  # images in a unit: about 30 MB of ImageNet, what a killed run does again
UNIT_BYTES = 32 << 20


class Sample(NamedTuple):
    """One image as it lies in the source. `name` may be a path below the class; it is unique within it."""

    label: int
    name: str
    data: bytes


class Unit(Protocol):
    """Part of a split."""

    split: str
    weight: int

    def samples(self) -> Iterator[Sample]: ...

    def weigh(self, sample: Sample) -> int: ...


@dataclass(frozen=True)
class Source:
    """A recognised source. Classes stand in the order of the labels."""

    layout: str  # in words, for the report
    root: Path
    classes: tuple[str, ...]
    words: tuple[str, ...]
    units: tuple[Unit, ...]
    expected: dict[str, list[int]]  # images of each class in a split, where the source says so beforehand
    official: bool = False  # the ILSVRC2012 set in its own layout
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Files:
    """Files below one folder, each with its label."""

    split: str
    folder: str
    names: tuple[str, ...]  # relative to the folder
    labels: tuple[int, ...]

    @property
    def weight(self) -> int:
        return len(self.names)

    def weigh(self, sample: Sample) -> int:
        return 1

    def samples(self) -> Iterator[Sample]:
        for name, label in zip(self.names, self.labels):
            with open(os.path.join(self.folder, name), "rb") as file:
                yield Sample(label, name, file.read())


def in_units(split: str, folder: str | Path, names: list[str], labels: list[int]) -> list[Files]:
    """The files of a folder as units."""
    steps = range(0, len(names), UNIT_FILES)
    return [
        Files(split, str(folder), tuple(names[at : at + UNIT_FILES]), tuple(labels[at : at + UNIT_FILES]))
        for at in steps
    ]


def count(units: list[Files], split: str, classes: int) -> list[int]:
    """Images of each class in a split."""
    counts = [0] * classes
    for unit in units:
        if unit.split == split:
            for label in unit.labels:
                counts[label] += 1
    return counts


def some(names: list[str] | tuple[str, ...], most: int = 5) -> str:
    """A few of them, in words."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_repeated(names: list[str] | tuple[str, ...]) -> str | None:
    """The first name that stands there twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
