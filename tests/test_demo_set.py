"""The drawn set: reproducible, whole or absent, like ImageNet in its files, and told apart by form, never by colour."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image, JpegImagePlugin
from torchvision.datasets import ImageFolder

from trainer.data.index import DataError, check_same_classes, open_index
from trainer.data.prepare import demo
from trainer.data.prepare.demo import make_demo

TRAIN, VAL = 45, 12
SMALL = {"classes": 3, "train_per_class": 4, "val_per_class": 2, "workers": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All classes, drawn by two processes."""
    root = tmp_path_factory.mktemp("made") / "deep" / "demo"
    assert make_demo(root, train_per_class=TRAIN, val_per_class=VAL, workers=2)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_layout_and_balance(made: Path) -> None:
    names = list(demo.MOTIFS)
    assert len(names) >= 10
    for split, count in (("train", TRAIN), ("val", VAL)):
        theirs = ImageFolder(made / split)
        assert theirs.classes == names
        assert Counter(theirs.targets) == dict.fromkeys(range(len(names)), count)
    assert (made / "train" / "star" / "0007.JPEG").is_file()
    words = json.loads((made / "class_index.json").read_text())
    assert [words[str(label)][0] for label in range(len(names))] == names
    assert "drawn" in (made / "README.txt").read_text()
    assert [path.name for path in made.parent.iterdir()] == ["demo"]


def test_every_file_is_sound(made: Path) -> None:
    """The index reads every header and looks for every end."""
    train, val = open_index(made / "train"), open_index(made / "val")
    check_same_classes(train, val)
    assert train.digest != val.digest


def test_an_image_depends_on_its_name_and_the_seed_alone(made: Path, tmp_path: Path) -> None:
    """Other numbers of classes, images and processes: the same files."""
    make_demo(tmp_path / "small", **SMALL)
    small = contents(tmp_path / "small")
    images = {name for name in small if name.endswith(".JPEG")}
    assert len(images) == 3 * (4 + 2)
    assert all(small[name] == (made / name).read_bytes() for name in images)
    assert len({small[name] for name in images}) == len(images)
    make_demo(tmp_path / "other", **SMALL, seed=1)
    other = contents(tmp_path / "other")
    assert all(small[name] != other[name] for name in images)


def test_sizes_are_like_imagenet() -> None:
    """ImageNet's means are about 470 x 400; the sample of 300 in shared/data has 462 x 398."""
    rng = np.random.default_rng(0)
    width, height = np.array([demo._size(rng) for _ in range(4000)]).T
    short, long = np.minimum(width, height), np.maximum(width, height)
    assert 440 < width.mean() < 490 and 380 < height.mean() < 425
    assert 0.75 < ((short >= 250) & (short <= 500)).mean() < 0.97
    assert 0.02 < (short < 250).mean() < 0.2 and 0.005 < (long > 700).mean() < 0.05
    assert 0.6 < (width > height).mean() < 0.8 and 0.15 < (width < height).mean() < 0.35
    assert short.min() >= 100 and long.max() <= 1500


def test_coding_is_as_various_as_imagenets(made: Path) -> None:
    modes, subsamplings, orientations, progressive, sizes = Counter(), Counter(), Counter(), 0, []
    for path in made.rglob("*.JPEG"):
        sizes.append(path.stat().st_size)
        with Image.open(path) as image:
            assert image.format == "JPEG"
            modes[image.mode] += 1
            subsamplings[JpegImagePlugin.get_sampling(image)] += 1
            orientations[image.getexif().get(0x0112, 1)] += 1
            progressive += "progressive" in image.info
    images = len(sizes)
    assert set(modes) == {"RGB", "L"} and 0.005 < modes["L"] / images < 0.08
    assert subsamplings[2] > 0.7 * images and subsamplings[0] > 0.03 * images  # 4:2:0 and 4:4:4
    assert 0 < images - orientations[1] < 0.03 * images
    assert 0 < progressive < 0.06 * images
    assert np.mean(sizes) < 42_000  # the default 3,500 images stay below 150 MB


def colours(root: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean colours (n, 3), colour histograms (n, 64) and labels (n,)."""
    means, histograms, labels = [], [], []
    for path, label in ImageFolder(root).samples:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((64, 64), Image.BOX))
        means.append(pixels.mean((0, 1)))
        histograms.append(np.bincount((pixels // 64 @ [16, 4, 1]).ravel(), minlength=64) / 64**2)
        labels.append(label)
    return np.array(means), np.array(histograms), np.array(labels)


def nearest_mean(x: np.ndarray, labels: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    centres = np.stack([x[labels == label].mean(0) for label in range(labels.max() + 1)])
    return ((unseen[:, None] - centres) ** 2).sum(-1).argmin(1)


def least_squares(x: np.ndarray, labels: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    ridge = 1e-3 * np.eye(x.shape[1] + 1)
    x, unseen = (np.concatenate([a, np.ones((len(a), 1))], 1) for a in (x, unseen))
    return (unseen @ np.linalg.solve(x.T @ x + ridge, x.T @ np.eye(labels.max() + 1)[labels])).argmax(1)


def test_colour_does_not_tell_the_class(made: Path) -> None:
    """10 classes: 10 % is chance. With the default numbers of images the four reach 10 to 13 %."""
    *seen, labels = colours(made / "train")
    *unseen, truth = colours(made / "val")
    for features, asked in zip(seen, unseen):
        for classify in (nearest_mean, least_squares):
            top1 = (classify(features, labels, asked) == truth).mean()
            assert top1 < 0.25, (classify.__name__, features.shape[1], top1)


@pytest.mark.parametrize("label", range(10))
def test_the_motif_shows_in_any_reasonable_crop(label: int) -> None:
    """A square third of the picture has motif and ground in it, 98 times out of 100."""
    good = []
    for number in range(12):
        rng = np.random.default_rng(number)
        size = (320, 240)
        mask = np.asarray(demo._mask(rng, list(demo.MOTIFS.values())[label](rng), size)) > 127
        side = round((0.35 * size[0] * size[1]) ** 0.5)
        for _ in range(10):
            x, y = rng.integers(0, np.array(size) - side + 1)
            good.append(0.02 < mask[y : y + side, x : x + side].mean() < 0.98)
    assert np.mean(good) >= 0.98


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, workers: int) -> None:
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done >= 40:
            raise Interrupted

    with pytest.raises(Interrupted):
        make_demo(tmp_path / "demo", classes=3, train_per_class=40, val_per_class=20, workers=workers, progress=stop)
    assert seen == [(20, 180), (40, 180)]
    assert list(tmp_path.iterdir()) == []


def alive(group: int) -> list[int]:
    """The processes of a group, without the zombies that nobody waits for in some containers."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = status.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(int(status.parent.name))
    return found


def test_a_killed_run_leaves_no_process(tmp_path: Path) -> None:
    code = f"from trainer.data.prepare.demo import make_demo; make_demo({str(tmp_path / 'demo')!r}, workers=2)"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, cwd=REPOSITORY)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.JPEG")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = alive(process.pid)
    for orphan in left:
        os.kill(orphan, 9)
    assert not left and not (tmp_path / "demo").exists()


def test_progress_ends_at_the_number_of_images(tmp_path: Path) -> None:
    seen = []
    (tmp_path / "demo").mkdir()  # an empty folder is no obstacle
    assert make_demo(tmp_path / "demo", **SMALL, progress=lambda *numbers: seen.append(numbers))
    assert seen == [(4, 18), (8, 18), (12, 18), (14, 18), (16, 18), (18, 18)]


def test_the_same_set_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_demo(tmp_path / "demo", **SMALL)
    open_index(tmp_path / "demo" / "train")  # its cache file is no change
    monkeypatch.setattr(demo, "_fill", lambda *_: pytest.fail("drawn again"))
    assert not make_demo(tmp_path / "demo", **SMALL)


def test_what_stands_there_is_never_overwritten(tmp_path: Path) -> None:
    root = tmp_path / "demo"

    def refused(match: str, **changes: int) -> None:
        before = contents(tmp_path)
        with pytest.raises(DataError, match=match) as caught:
            make_demo(root, **(SMALL | changes))
        assert "\n" not in str(caught.value) and contents(tmp_path) == before

    make_demo(root, **SMALL)
    refused(r"demo exists and holds a demo set of other parameters: remove it or choose another", seed=1)
    refused(r"a demo set of other parameters", train_per_class=5)
    (root / "train" / "disc" / "0001.JPEG").unlink()
    refused(r"demo exists and holds an incomplete demo set: remove it or choose another")
    (root / "demo.json").unlink()
    refused(r"demo exists and holds other data: remove it or choose another")
    root = tmp_path / "file"
    root.write_text("a file")
    refused(r"file exists and holds other data")
    root = tmp_path / "file" / "below"
    refused(r"below cannot be written \(Not a directory\): choose another destination")


@pytest.mark.parametrize(
    "change", [{"classes": 1}, {"classes": 11}, {"train_per_class": 0}, {"val_per_class": 0}, {"seed": -1}]
)
def test_impossible_numbers_are_refused(tmp_path: Path, change: dict[str, int]) -> None:
    with pytest.raises(DataError, match=r"no demo set of .*: use 2 to 10 classes"):
        make_demo(tmp_path / "demo", **(SMALL | change))
