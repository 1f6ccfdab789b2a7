"""What the labels of an evaluation set mean to a network: ImageNet's, and those of ReaL, -V2, -A and -R."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trainer.config import ConfigError
from trainer.data.shards import CLASS_FILE
from trainer.data.table import Index

_WNID = re.compile(r"n\d{8}")
_VAL = re.compile(r"ILSVRC2012_val_(\d{8})")


@dataclass(frozen=True)
class Fit:
    """An index whose labels are classes of the network, or of the part of it that is asked."""

    index: Index
    columns: np.ndarray | None = None  # the network's classes that are asked, int64 (k,), by label; None: all


def fit(index: Index, classes: tuple[str, ...] | None, *, numbered: bool = False, subset: bool = False) -> Fit:
    """`index` as a network of `classes` takes it; ConfigError where its labels mean something else.

    Args:
        classes: the network's, by label; None where nobody knows them: then the folders' are taken on trust.
        numbered: the folders' names are labels, as in ImageNet-V2, whose "10" sorts before "2".
        subset: only the logits of the classes that the set has are compared, as the authors of ImageNet-A and -R do
            (arXiv:1907.07174, arXiv:2006.16241).
    """
    if numbered:
        return Fit(_numbered(index, classes))
    if subset:
        if classes is None:
            raise ConfigError("--subset needs the names of the network's classes: add --classes class_index.json")
        if strange := [name for name in index.classes if name not in classes]:
            raise ConfigError(f"{index.root} has the class {strange[0]}, which the network does not: drop --subset")
        number = {name: label for label, name in enumerate(classes)}
        return Fit(index, np.array([number[name] for name in index.classes], np.int64))
    if classes is None or classes == index.classes:
        return Fit(index)
    counts = f"the network has {len(classes)} classes and {index.root} has {len(index.classes)}"
    if set(index.classes) < set(classes):
        raise ConfigError(f"{counts}, all of them among the network's: add --subset to compare only these")
    if set(index.classes) <= {str(label) for label in range(len(classes))}:
        raise ConfigError(f"{counts}, named by numbers: add --numbered if these are the network's labels")
    strange = [name for name in index.classes if name not in classes] or [n for n in classes if n not in index.classes]
    if not strange:  # the same names in another order
        number = {name: label for label, name in enumerate(classes)}
        return Fit(_relabelled(index, np.array([number[name] for name in index.classes]), classes))
    raise ConfigError(f"{counts}; {strange[0]} is not in both: evaluate on images of the network's own classes")


def _numbered(index: Index, classes: tuple[str, ...] | None) -> Index:
    count = len(classes) if classes else len(index.classes)
    wrong = [name for name in index.classes if not name.isdecimal() or int(name) >= count]
    if wrong:
        raise ConfigError(
            f"--numbered: the folder {index.root / wrong[0]} is not named by a label below {count}: leave it out"
        )
    names = classes or tuple(sorted(index.classes, key=int))
    return _relabelled(index, np.array([int(name) for name in index.classes]), names)


def _relabelled(index: Index, numbers: np.ndarray, classes: tuple[str, ...]) -> Index:
    return replace(index, labels=numbers[index.labels].astype(np.int32), classes=classes)


def read_classes(path: str | Path) -> tuple[str, ...]:
    """The classes by label of a class_index.json ({"0": ["n01440764", "tench"], ...}); ConfigError if it is none."""
    return tuple(name for name, _ in _class_index(Path(path)))


def _class_index(path: Path) -> list[tuple[str, str]]:
    """(class, words) by label."""
    try:
        table = json.loads(path.read_text())
        return [(str(table[str(label)][0]), str(table[str(label)][1])) for label in range(len(table))]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): give a class_index.json") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f'{path} is not {{"0": ["CLASS", "words"], ...}} without a gap: make it anew') from error


def words(classes: tuple[str, ...], root: str | Path) -> tuple[str, ...]:
    """What to call the classes: as class_index.json in `root` says, wnids by ImageNet's words, else by their names."""
    table: dict[str, str] = {}
    if all(_WNID.fullmatch(name) for name in classes):
        from timm.data import ImageNetInfo

        known = ImageNetInfo("imagenet-22k")
        table = dict(zip(known.label_names(), map(known.index_to_description, range(known.num_classes()))))
    path = Path(root) / CLASS_FILE
    if path.exists():
        table |= dict(_class_index(path))
    return tuple(table.get(name, name) for name in classes)


class Real:
    """ImageNet-ReaL: for each of the 50,000 validation images all labels that fit (arXiv:2006.07159).

    The file is real.json of google-research/reassessed-imagenet: a list of lists, by the number of the validation file;
    an empty list is an image that nobody agreed on, which is not counted.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self._labels = [frozenset(map(int, labels)) for labels in json.loads(Path(path).read_text())]
        except OSError as error:
            raise ConfigError(f"--real {path} cannot be read ({error.strerror}): give ReaL's real.json") from error
        except (TypeError, ValueError) as error:
            raise ConfigError(f"--real {path} is not a list of lists of labels: give ReaL's real.json") from error
        self._path = path

    def top1(self, index: Index, rows: np.ndarray, predicted: np.ndarray) -> tuple[float, int]:
        """(percent of images whose prediction is among their labels, images that have any).

        Args:
            rows: which images of `index`, (n,), each named as ImageNet names it.
            predicted: a class for each, (n,).
        """
        right = counted = 0
        for path, prediction in zip(index.paths(rows), predicted.tolist()):
            labels = self._of(path)
            counted += bool(labels)
            right += prediction in labels
        if not counted:
            raise ConfigError(f"--real {self._path} has no label for any of these images: leave it out")
        return 100 * right / counted, counted

    def _of(self, path: str) -> frozenset[int]:
        found = _VAL.search(Path(path).name)
        if found is None or not 0 < int(found[1]) <= len(self._labels):
            raise ConfigError(
                f"--real {self._path} knows {len(self._labels)} images by number, and {path} is not named "
                f"ILSVRC2012_val_NNNNNNNN accordingly: leave --real out"
            )
        return self._labels[int(found[1]) - 1]
