"""Hugging Face's parquet files: a column `image` of {bytes, path} and a column `label` of integers.

Class folders must sort in the order of the labels. Where the names in the schema are WordNet ids in that order they
are the folders, and where they are words, as in imagenet-1k, the ids in the names of the images are, by which Hugging
Face's own script for that set tells the class (n01440764_10026_n01440764.JPEG). Otherwise the folders are class0000,
class0001, ... and the names are kept as words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.index import DataError
from trainer.data.prepare.samples import UNIT_FILES, Sample, Source, Unit, first_repeated, some

_NAME = re.compile(r"(?P<split>[A-Za-z]+)(?:-(?P<number>\d{5})-of-(?P<total>\d{5})(?:-[0-9a-f]+)?)?\.parquet")
_VAL = ("validation", "valid", "val", "test")  # the first that is there
_WNID = re.compile(r"(?:.*[/_])?(n\d{8})(?:_\d+)?\.\w+")
_BATCH = 32  # rows decoded at a time


@dataclass(frozen=True)
class Rows:
    """Rows `begin` to `end` of one row group."""

    split: str
    path: str
    number: int  # of the file among its split's
    group: int
    first: int  # the row of the file that the group begins with
    begin: int
    end: int
    classes: int

    @property
    def weight(self) -> int:
        return self.end - self.begin

    def weigh(self, sample: Sample) -> int:
        return 1

    def samples(self) -> Iterator[Sample]:
        row = 0
        with _library().ParquetFile(self.path) as file:
            for batch in file.iter_batches(_BATCH, row_groups=[self.group], columns=["image", "label"]):
                if row < self.end and row + len(batch) > self.begin:
                    for at, values in enumerate(batch.to_pylist(), row):
                        if self.begin <= at < self.end:
                            yield self._sample(self.first + at, values)
                row += len(batch)

    def _sample(self, row: int, values: dict[str, Any]) -> Sample:
        label, image = values["label"], values["image"]
        if label is None or not 0 <= label < self.classes:
            raise DataError(
                f"{self.path} row {row} has the label {label}, outside 0 .. {self.classes - 1}: "
                "give files whose labels are known"
            )
        if not image or image["bytes"] is None:
            raise DataError(f"{self.path} row {row} has no image bytes: give files with the images inside")
        # The row makes the name unique; the path, where there is one, keeps it traceable.
        path = re.sub(r"[^\w.-]", "_", (image["path"] or "").rsplit("/", 1)[-1])
        suffix = ".png" if image["bytes"][:4] == b"\x89PNG" else ".JPEG"
        return Sample(
            label, f"{self.number:05}_{row:06}_{path}" if path else f"{self.number:05}_{row:06}{suffix}", image["bytes"]
        )


def find(root: Path) -> list[Path]:
    """The parquet files of a source, in the folder or in its data/."""
    return sorted(root.glob("*.parquet")) or sorted((root / "data").glob("*.parquet"))


def parquet(root: Path) -> Source:
    """The splits train and validation (or valid, val, test: the first there is) of the parquet files below `root`."""
    library, files = _library(), find(root)
    found: dict[str, list[tuple[re.Match[str], Path]]] = {}
    for path in files:
        match = _NAME.fullmatch(path.name)
        if not match:
            raise DataError(f"{path} is not called SPLIT-00000-of-00001.parquet: rename or remove it")
        found.setdefault(match["split"], []).append((match, path))
    val = next((name for name in _VAL if name in found), None)
    if "train" not in found or val is None:
        raise DataError(
            f"{files[0].parent} holds the splits {some(sorted(found))}: "
            "it needs train and one of validation, valid, val, test"
        )
    names = _names(library, found["train"][0][1])
    units, expected = [], {}
    for split, theirs in (("train", "train"), ("val", val)):
        _complete(found[theirs])
        for number, (_, path) in enumerate(found[theirs]):
            units += _file_units(library, split, path, number, len(names))
    wnids = names if all(re.fullmatch(r"n\d{8}", name) for name in names) else _ids(library, found["train"], len(names))
    named = wnids is not None and wnids == sorted(set(wnids))
    classes = wnids if named else [f"class{label:04}" for label in range(len(names))]
    notes = [f"left out: the split {name}" for name in sorted(found) if name not in ("train", val)]
    if not named:
        notes.append("the class folders are class0000, class0001, ...: the files tell no WordNet ids in sorted order")
    return Source(
        "Hugging Face parquet files", root, tuple(classes), tuple(names), tuple(units), expected, notes=tuple(notes)
    )


def _library() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            "reading parquet files needs pyarrow, which is not installed: pip install imagenet-trainer[parquet]"
        ) from None
    return pyarrow.parquet


def _complete(found: list[tuple[re.Match[str], Path]]) -> None:
    """DataError where files of a split are missing."""
    totals = {match["total"] for match, _ in found}
    if len(totals) > 1:
        raise DataError(f"{found[0][1].parent} mixes {some([path.name for _, path in found])}: keep one set of files")
    total = totals.pop()
    if total is None:
        return
    there = {int(match["number"]) for match, _ in found}
    if missing := sorted(set(range(int(total))) - there):
        name = f"{found[0][0]['split']}-{missing[0]:05}-of-{total}.parquet"
        raise DataError(f"{found[0][1].parent} lacks {name} ({len(missing)} of {int(total)} missing): download it")


def _names(library: Any, path: Path) -> list[str]:
    """The names of the classes from the schema, else class0000, ... up to the largest training label."""
    schema = _open(library, path).schema_arrow
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = list(features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        names = []
    if not names:
        names = [f"class{label:04}" for label in range(_largest(library, path) + 1)]
    if twice := first_repeated(names):
        raise DataError(f"{path} calls two classes {twice!r}: correct the names in its schema")
    return names


def _ids(library: Any, found: list[tuple[re.Match[str], Path]], classes: int) -> list[str] | None:
    """The WordNet id of each label by the names of training images, read until all are seen; None where they differ."""
    ids: dict[int, str] = {}
    for _, path in found:
        with _open(library, path) as file:
            for batch in file.iter_batches(4096, columns=["image.path", "label"]):
                for row in batch.to_pylist():
                    match = _WNID.fullmatch(row["image"]["path"] or "") if row["image"] else None
                    if match is None or ids.setdefault(row["label"], match[1]) != match[1]:
                        return None
        if len(ids) >= classes:
            break
    return [ids[label] for label in range(classes)] if set(ids) == set(range(classes)) else None


def _largest(library: Any, path: Path) -> int:
    """The largest label in the training files beside `path`."""
    largest = -1
    for file in sorted(path.parent.glob("train*.parquet")):
        with _open(library, file) as opened:
            for batch in opened.iter_batches(65536, columns=["label"]):
                largest = max([largest, *(label for label in batch.column(0).to_pylist() if label is not None)])
    return largest


def _open(library: Any, path: Path) -> Any:
    try:
        file = library.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is cut short or no parquet file ({reason}): download it again") from None
    types = {field.name: str(field.type) for field in file.schema_arrow}
    if not types.get("image", "").startswith("struct<bytes: ") or not types.get("label", "").startswith(
        ("int", "uint")
    ):
        raise DataError(
            f"{path} has the columns {some([f'{name} ({kind})' for name, kind in types.items()])}: "
            "it needs image (struct of bytes and path) and label (integer)"
        )
    return file


def _file_units(library: Any, split: str, path: Path, number: int, classes: int) -> list[Unit]:
    units: list[Unit] = []
    with _open(library, path) as file:
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            for begin in range(0, rows, UNIT_FILES):
                end = min(begin + UNIT_FILES, rows)
                units.append(Rows(split, str(path), number, group, first, begin, end, classes))
            first += rows
    return units
