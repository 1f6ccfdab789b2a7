"""Sources that are folders of image files: an ImageFolder, the Kaggle layout of ILSVRC, Tiny-ImageNet as it comes."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from pathlib import Path

from trainer.data.index import IMAGE_SUFFIXES, DataError
from trainer.data.prepare.samples import Files, Source, count, first_repeated, in_units, some

VAL_FOLDERS = ("val", "validation", "test")
KAGGLE_DATA = Path("ILSVRC") / "Data" / "CLS-LOC"
KAGGLE_VAL, KAGGLE_WORDS = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
TINY_VAL = Path("val") / "val_annotations.txt"


def image_folder(root: Path) -> Source:
    """root/train/CLASS/** and root/{val,validation,test}/CLASS/**, as torchvision reads them."""
    folders = {"train": root / "train", "val": next(root / name for name in VAL_FOLDERS if (root / name).is_dir())}
    found = {split: _class_folders(folder) for split, folder in folders.items()}
    classes = sorted(found["train"])
    if found["train"] != found["val"]:
        lone = sorted(set(found["train"]) ^ set(found["val"]))
        raise DataError(
            f"{folders['train']} has {len(found['train'])} class folders, {folders['val']} has {len(found['val'])}: "
            f"{some(lone)} is not in both; give both the same class folders"
        )
    units: list[Files] = []
    for split, folder in folders.items():
        for label, name in enumerate(classes):
            files = _images(folder / name)
            if not files:
                raise DataError(f"{folder / name} has no images ({', '.join(IMAGE_SUFFIXES)}): fill or remove it")
            units += in_units(split, folder / name, files, [label] * len(files))
    words = _words_of(root / "class_index.json", classes)
    return _source("an ImageFolder", root, classes, words, units)


def kaggle(root: Path) -> Source:
    """The ILSVRC archive of Kaggle, unpacked: training images in class folders, the others flat, labels in a CSV."""
    data = root / KAGGLE_DATA
    for needed in (root / KAGGLE_VAL, root / KAGGLE_WORDS, data / "train", data / "val"):
        if not needed.exists():
            raise DataError(f"{root} is the Kaggle layout but lacks {needed.relative_to(root)}: put it there")
    rows = [line.split(maxsplit=1) for line in (root / KAGGLE_WORDS).read_text().splitlines() if line.strip()]
    words = {row[0]: row[1].strip() if len(row) > 1 else row[0] for row in rows}
    if twice := first_repeated([row[0] for row in rows]):
        raise DataError(f"{root / KAGGLE_WORDS} lists the class {twice} twice: use the original file")
    classes = sorted(words)
    _same_folders(data / "train", classes, root / KAGGLE_WORDS)
    units = _train_units(data / "train", classes, "")
    try:
        with open(root / KAGGLE_VAL, newline="") as file:
            solution = [(row["ImageId"] + ".JPEG", row["PredictionString"].split()[0]) for row in csv.DictReader(file)]
    except (KeyError, IndexError, TypeError, AttributeError):
        columns = "ImageId and PredictionString (WNID and a box)"
        raise DataError(f"{root / KAGGLE_VAL} has a line without {columns}: use the original file") from None
    units += _flat_units(data / "val", solution, classes, root / KAGGLE_VAL)
    source = _source("the Kaggle layout of ILSVRC2012", root, classes, [words[name] for name in classes], units)
    return dataclasses.replace(source, official=len(classes) == 1000)


def tiny(root: Path) -> Source:
    """Tiny-ImageNet's own layout: train/WNID/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt."""
    lists = root / "wnids.txt"
    if not lists.is_file():
        raise DataError(f"{root} looks like Tiny-ImageNet but lacks wnids.txt: put it there")
    names = lists.read_text().split()
    if twice := first_repeated(names):
        raise DataError(f"{lists} lists the class {twice} twice: use the original file")
    classes = sorted(names)
    words = dict.fromkeys(classes, "")
    if (root / "words.txt").is_file():
        for line in (root / "words.txt").read_text().splitlines():
            wnid, _, text = line.partition("\t")
            if wnid in words:
                words[wnid] = text.strip()
    _same_folders(root / "train", classes, lists)
    units = _train_units(root / "train", classes, "images")
    lines = [line.split("\t") for line in (root / TINY_VAL).read_text().splitlines() if line.strip()]
    if bad := [line for line in lines if len(line) < 2]:
        raise DataError(f"{root / TINY_VAL} has the line {bad[0][0]!r}, not FILE, tab, WNID ...: use the original file")
    units += _flat_units(root / "val" / "images", [(line[0], line[1]) for line in lines], classes, root / TINY_VAL)
    return _source("Tiny-ImageNet's own layout", root, classes, [words[name] or name for name in classes], units)


def _source(layout: str, root: Path, classes: list[str], words: list[str], units: list[Files]) -> Source:
    expected = {split: count(units, split, len(classes)) for split in ("train", "val")}
    return Source(layout, root, tuple(classes), tuple(words), tuple(units), expected)


def _class_folders(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        shown = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    loose = [name for name, is_folder in shown if not is_folder and name.lower().endswith(IMAGE_SUFFIXES)]
    if loose:
        raise DataError(
            f"{folder} holds {len(loose)} images outside any class folder, {min(loose)} first: "
            "move them to the folder of their class"
        )
    return {name for name, is_folder in shown if is_folder}


def _images(folder: Path) -> list[str]:
    """The images below a folder, relative to it, sorted; hidden ones ignored, links to folders followed."""
    found: list[str] = []
    for here, inner, files in os.walk(folder, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        below = os.path.relpath(here, folder)
        shown = [name for name in files if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)]
        found += shown if below == "." else [f"{below}/{name}" for name in shown]
    return sorted(found)


def _same_folders(train: Path, classes: list[str], listed_in: Path) -> None:
    lone = sorted(_class_folders(train) ^ set(classes))
    if lone:
        where = "listed there but no folder" if lone[0] in classes else "a folder but not listed"
        raise DataError(
            f"{train} and {listed_in} do not name the same classes: {some(lone)} differ ({lone[0]} is {where}); "
            "unpack the archive again"
        )


def _train_units(train: Path, classes: list[str], below: str) -> list[Files]:
    units = []
    for label, name in enumerate(classes):
        files = _images(train / name / below) if (train / name / below).is_dir() else []
        if not files:
            raise DataError(f"{train / name / below} has no images: unpack the archive again")
        units += in_units("train", train / name / below, files, [label] * len(files))
    return units


def _flat_units(folder: Path, truth: list[tuple[str, str]], classes: list[str], listed_in: Path) -> list[Files]:
    """Units of a folder whose labels stand in a list of (file, wnid); both must name the same files."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not there: unpack the archive again")
    labels = {name: label for label, name in enumerate(classes)}
    truth = sorted(truth)
    if twice := first_repeated([name for name, _ in truth]):
        raise DataError(f"{listed_in} lists {twice} twice: use the original file")
    if strange := [wnid for _, wnid in truth if wnid not in labels]:
        raise DataError(
            f"{listed_in} names the class {strange[0]}, which has no training images: use the original file"
        )
    listed, there = {name for name, _ in truth}, set(_images(folder))
    if lone := sorted(listed ^ there):
        what = "is listed but not there" if lone[0] in listed else "is there but not listed"
        raise DataError(
            f"{folder} holds {len(there)} images and {listed_in} lists {len(listed)}: {lone[0]} {what}; "
            "unpack the archive again"
        )
    return in_units("val", folder, [name for name, _ in truth], [labels[wnid] for _, wnid in truth])


def _words_of(file: Path, classes: list[str]) -> list[str]:
    """The words in a class_index.json for the classes it names, else the class's own name."""
    try:
        known = {entry[0]: entry[1] for entry in json.loads(file.read_text()).values()}
    except (OSError, ValueError, AttributeError, IndexError, TypeError):
        known = {}
    return [known.get(name, name) for name in classes]
