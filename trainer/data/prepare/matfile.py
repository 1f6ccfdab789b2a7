"""The synsets of the ILSVRC devkit's meta.mat, without scipy: just what is needed of MATLAB's level 5 format.

A file is 128 bytes of header, then elements: type and size (4 bytes each; or both in one word and up to 4 bytes of
data behind), data, padding to 8 bytes. A compressed element holds one element and is not padded.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

_MATRIX, _COMPRESSED = 14, 15  # element types
_STRUCT, _CHAR = 2, 4  # matrix classes; from 6 on they are numbers
_NUMBERS = {1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le"}


@dataclass(frozen=True)
class Synset:
    """A class of the challenge: `number` is its ILSVRC2012_ID, from 1 on."""

    number: int
    wnid: str
    words: str


def read_synsets(data: bytes) -> list[Synset]:
    """The leaves (synsets without children: the classes) in a meta.mat, by number; ValueError says what is wrong."""
    if data[126:128] != b"IM":
        raise ValueError("is no MATLAB level 5 file")
    try:
        at, found = 128, {}
        while at < len(data):
            kind, payload, at = _element(data, at)
            if kind == _COMPRESSED:
                kind, payload, _ = _element(zlib.decompress(payload), 0)
            if kind == _MATRIX:
                name, value = _matrix(payload)
                found[name] = value
        leaves = [row for row in found["synsets"] if not (row["num_children"] or [0])[0]]
        synsets = [Synset(int(row["ILSVRC2012_ID"][0]), row["WNID"], row["words"]) for row in leaves]
    except KeyError as error:
        raise ValueError(f"has no {error}") from None
    except (TypeError, IndexError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"is damaged ({error})") from None
    return sorted(synsets, key=lambda synset: synset.number)


def _element(data: bytes, at: int) -> tuple[int, bytes, int]:
    """(type, data, offset of the next element) of the element at `at`."""
    kind, size = int.from_bytes(data[at : at + 4], "little"), int.from_bytes(data[at + 4 : at + 8], "little")
    if kind >> 16:  # the small form
        return kind & 0xFFFF, data[at + 4 : at + 4 + (kind >> 16)], at + 8
    end = at + 8 + size
    if end > len(data):
        raise IndexError(f"cut short at byte {len(data)}")
    return kind, data[at + 8 : end], end if kind == _COMPRESSED else end + -size % 8


def _matrix(data: bytes) -> tuple[str, Any]:
    """(name, value): a list of numbers, a text, a list of dicts for a struct array, None for what is not needed."""
    if not data:
        return "", None
    _, flags, at = _element(data, 0)
    _, shape, at = _element(data, at)
    _, name, at = _element(data, at)
    if flags[0] == _STRUCT:
        _, width, at = _element(data, at)
        _, names, at = _element(data, at)
        step = int.from_bytes(width, "little")
        fields = [names[i : i + step].split(b"\0")[0].decode() for i in range(0, len(names), step)]
        rows = []
        for _ in range(math.prod(np.frombuffer(shape, "<i4").tolist())):
            row = {}
            for field in fields:
                _, payload, at = _element(data, at)
                row[field] = _matrix(payload)[1]
            rows.append(row)
        return name.decode(), rows
    if flags[0] == _CHAR:
        kind, text, _ = _element(data, at)
        return name.decode(), text.decode(_TEXTS[kind])
    if flags[0] >= 6:
        kind, numbers, _ = _element(data, at)
        return name.decode(), np.frombuffer(numbers, _NUMBERS[kind]).tolist()
    return name.decode(), None
