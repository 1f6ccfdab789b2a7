"""Labels that mean what the network means, and the sums over answers."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import draw
from nets import ALONE  # noqa: F401 (imports torch before DALI)

from trainer import labels
from trainer.answers import Answers
from trainer.calibration import expected_error
from trainer.config import ConfigError
from trainer.data.index import open_index
from trainer.data.table import Index, assemble


def index_of(classes: tuple[str, ...], each: int = 2, names: str = "{c}/{n}.JPEG") -> Index:
    wanted = np.repeat(np.arange(len(classes)), each)
    files = [names.format(c=classes[label], n=number) for number, label in enumerate(wanted)]
    return assemble(Path("/set"), classes, wanted, np.ones((len(files), 3), np.int64), files)


def test_numbers_sort_as_numbers() -> None:
    index = index_of(tuple(sorted(str(number) for number in range(12))))
    assert index.classes[:3] == ("0", "1", "10")
    found = labels.fit(index, None, numbered=True).index
    folders = [int(path.split("/")[2]) for path in found.paths(np.arange(len(found)))]
    assert found.labels.tolist() == folders and found.classes[:3] == ("0", "1", "2")
    words = tuple(f"n{number:08}" for number in range(12))
    assert labels.fit(index, words, numbered=True).index.classes == words
    with pytest.raises(ConfigError, match=r"/set/11 is not named by a label below 11"):
        labels.fit(index, words[:11], numbered=True)
    with pytest.raises(ConfigError, match=r"named by numbers: add --numbered"):
        labels.fit(index, words)


def test_a_subset_is_compared_among_itself_and_only_if_asked() -> None:
    classes = ("a", "b", "c", "d")
    index = index_of(("b", "d"))
    assert labels.fit(index, classes, subset=True).columns.tolist() == [1, 3]
    with pytest.raises(ConfigError, match=r"4 classes and /set has 2, all of them .* add --subset"):
        labels.fit(index, classes)
    with pytest.raises(ConfigError, match=r"has the class x, which the network does not"):
        labels.fit(index_of(("b", "x")), classes, subset=True)
    with pytest.raises(ConfigError, match=r"--subset needs the names .* --classes"):
        labels.fit(index, None, subset=True)
    with pytest.raises(ConfigError, match=r"x is not in both"):
        labels.fit(index_of(("a", "b", "c", "x")), classes)
    # The same names in another order keep their meaning.
    turned = labels.fit(index_of(classes), ("d", "c", "b", "a")).index
    assert turned.labels.tolist() == [3, 3, 2, 2, 1, 1, 0, 0]


def test_real_counts_images_that_have_labels(tmp_path: Path) -> None:
    index = index_of(("n1", "n2"), 3, names="{c}/val_ILSVRC2012_val_{n:08}.JPEG")
    files = [int(Path(path).stem[-8:]) for path in index.paths(np.arange(6))]
    (tmp_path / "real.json").write_text(json.dumps([[0], [0, 1], [], [7], [1]]))
    real = labels.Real(tmp_path / "real.json")
    rows = np.array([row for row in range(6) if files[row] > 0])  # files 1 to 5
    assert real.top1(index, rows, np.array([0, 1, 1, 1, 1])) == (75.0, 4)
    with pytest.raises(ConfigError, match=r"knows 5 images by number, and .*00000000"):
        real.top1(index, np.array([0]), np.array([0]))
    (tmp_path / "bad.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match=r"--real .*bad\.json is not a list of lists"):
        labels.Real(tmp_path / "bad.json")


def test_words_are_those_of_the_class_index_then_of_imagenet(tmp_path: Path) -> None:
    assert labels.words(("n01440764", "n01443537"), tmp_path) == ("tench, Tinca tinca", "goldfish, Carassius auratus")
    (tmp_path / "class_index.json").write_text(json.dumps({"0": ["n01440764", "a fish"], "1": ["x", "y"]}))
    assert labels.words(("n01440764", "n01443537"), tmp_path) == ("a fish", "goldfish, Carassius auratus")
    assert labels.words(("x", "z"), tmp_path) == ("y", "z")
    assert labels.read_classes(tmp_path / "class_index.json") == ("n01440764", "x")
    with pytest.raises(ConfigError, match="cannot be read"):
        labels.read_classes(tmp_path / "none.json")


def test_calibration_error_is_its_definition() -> None:
    random = np.random.default_rng(0)
    confidence, right = random.random(1000), random.random(1000) < 0.6
    expected, edges = 0.0, np.arange(16) / 15
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert expected_error(confidence, right) == pytest.approx(expected, rel=1e-12)
    # As sure as it is right: none. Sure of everything and right by half: a half. The edge belongs to the lower bin.
    assert expected_error(np.full(4, 0.75), np.array([1, 1, 1, 0], bool)) == 0
    assert expected_error(np.ones(4), np.array([1, 1, 0, 0], bool)) == 0.5
    edge = np.array([1 / 15, 1.5 / 15]), np.array([True, False])
    assert expected_error(*edge) == pytest.approx((14 / 15 + 1.5 / 15) / 2), "two bins, so nothing cancels"


def test_classes_and_confusions_add_up() -> None:
    random = np.random.default_rng(1)
    truth, predicted = random.integers(0, 5, 300), random.integers(0, 5, 300)
    position = np.where(truth == predicted, 0, random.integers(1, 9, 300))
    answers = Answers(np.arange(300), truth, predicted, position, random.random(300))
    names = tuple("abcdef")
    rows = answers.per_class(names)
    assert [row["name"] for row in rows] == list("abcde"), "a class without images has no accuracy"
    assert sum(row["count"] * row["top1"] / 100 for row in rows) == pytest.approx((truth == predicted).sum(), abs=0.01)
    pairs = answers.confusions(names, most=100)
    assert sum(pair["count"] for pair in pairs) == (truth != predicted).sum()
    counts = [pair["count"] for pair in pairs]
    assert counts == sorted(counts, reverse=True) and all(pair["actual"] != pair["predicted"] for pair in pairs)
    first = pairs[0]
    same = (truth == names.index(first["actual"])) & (predicted == names.index(first["predicted"]))
    assert first["count"] == same.sum()


def test_folders_on_disk_are_renumbered(tmp_path: Path) -> None:
    draw(tmp_path, 11, [1] * 11, seed=3, side=8)
    for number in range(11):
        (tmp_path / f"class{number}").rename(tmp_path / str(number))
    found = labels.fit(open_index(tmp_path), None, numbered=True).index
    assert [int(Path(p).parent.name) for p in found.paths(np.arange(11))] == found.labels.tolist()
