"""The index equals torchvision's ImageFolder and Pillow's sizes, notices every change, and refuses bad data by name."""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from trainer.data import index, jpeg, table
from trainer.data.index import CACHE_NAME, DataError, Index, check_same_classes, find_split, open_index

COLUMNS = ("labels", "widths", "heights", "sizes", "offsets", "names")


def image_bytes(size: tuple[int, int] = (40, 30), kind: str = "JPEG", **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes, a nested folder, a linked folder, several formats and spellings, and files that do not count."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root = tmp_path / "data"
    names = "b/2.JPEG b/10.jpg b/1.JpEg a-b/x.JPEG a/z.png a/deep-er/1.jpg a/deep/2.jpg a/ünï+cödé.bmp a/.hidden.jpg"
    for number, path in enumerate(root / name.replace("+", " ") for name in names.split()):
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {".png": "PNG", ".bmp": "BMP"}.get(path.suffix, "JPEG")
        path.write_bytes(image_bytes((10 + 3 * number, 50 - 2 * number), kind))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked.webp").write_bytes(image_bytes((21, 22), "WEBP"))
    (root / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "notes.txt").touch()
    (root / "list.csv").touch()
    return root


def assert_same(left: Index, right: Index) -> None:
    assert left.classes == right.classes and left.digest == right.digest
    for name in COLUMNS:
        a, b = getattr(left, name), getattr(right, name)
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), name


def assert_is_image_folder(made: Index, root: Path) -> None:
    theirs = ImageFolder(root)
    samples = [(path, label) for path, label in theirs.samples if not os.path.basename(path).startswith(".")]
    assert list(made.classes) == theirs.classes
    assert list(zip(made.paths(np.arange(len(made))), made.labels.tolist())) == samples
    for row, (path, _) in enumerate(samples):
        with Image.open(path) as image:
            assert (made.widths[row], made.heights[row]) == image.size, path
        assert made.sizes[row] == os.path.getsize(path)


def test_equals_image_folder_and_pillow(folder: Path, tmp_path: Path) -> None:
    made = open_index(folder)
    assert len(made) == 9
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(CACHE_NAME))
    assert_same(made, open_index(tmp_path / "copy"))  # the digest does not depend on the place
    assert_is_image_folder(made, folder)
    assert_is_image_folder(open_index(folder), folder)  # the cache file is no class to torchvision either
    assert made.path(8) == made.paths(np.array([3, 8]))[1]
    with pytest.raises(IndexError):
        made.paths(np.array([-1]))


def test_equals_image_folder_on_imagenet(imagenet_sample: Path) -> None:
    made = open_index(imagenet_sample)
    assert len(made) == 300
    assert_is_image_folder(made, imagenet_sample)


def test_reopening_reads_no_image_and_gives_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_index(folder)
    monkeypatch.setattr(index, "_scan", lambda *_: pytest.fail("scanned again"))
    again = open_index(folder)
    assert_same(first, again)
    assert not again.labels.flags.writeable
    for path in again.paths(np.arange(len(again))):
        os.truncate(path, 0)  # an overwritten file goes unseen, as the docstring says
    assert_same(first, open_index(folder))


CHANGES = {
    "add": lambda root: (root / "b" / "3.jpg").write_bytes(image_bytes()),
    "remove": lambda root: (root / "b" / "2.JPEG").unlink(),
    "rename": lambda root: (root / "b" / "2.JPEG").rename(root / "b" / "4.JPEG"),
    "replace by renaming": lambda root: (root / "a" / "deep" / "2.jpg").rename(root / "b" / "2.JPEG"),
    "nested": lambda root: (root / "a" / "deep" / "3.jpg").write_bytes(image_bytes()),
    "linked": lambda root: (root / "a" / "link" / "3.jpg").write_bytes(image_bytes()),
    "new class": lambda root: shutil.copytree(root / "a-b", root / "c"),
    "class gone": lambda root: shutil.rmtree(root / "b"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(folder: Path, change: str) -> None:
    (folder / "a" / "deep" / "1.jpg").write_bytes(image_bytes())  # so that the folder is never empty
    before = open_index(folder)
    CHANGES[change](folder)
    after = open_index(folder)
    assert after.digest != before.digest
    assert_is_image_folder(after, folder)
    assert_same(after, open_index(folder))


def refuse_writes_to(monkeypatch: pytest.MonkeyPatch, *roots: Path) -> None:
    real = index.store

    def store(place, *rest):
        if place.parent in roots:
            raise PermissionError(13, "Permission denied")
        return real(place, *rest)

    monkeypatch.setattr(index, "store", store)


def test_read_only_folder_is_cached_elsewhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_writes_to(monkeypatch, folder)
    first = open_index(folder)
    elsewhere = open_index(folder, cache_dir=tmp_path / "mine")
    assert not (folder / CACHE_NAME).exists()
    assert len(list((tmp_path / "home/.cache/imagenet-trainer/index").iterdir())) == 1
    assert len(list((tmp_path / "mine").iterdir())) == 1
    monkeypatch.setattr(index, "_scan", lambda *_: pytest.fail("scanned again"))
    assert_same(first, open_index(folder))
    assert_same(first, elsewhere)
    monkeypatch.undo()
    refuse_writes_to(monkeypatch, folder, tmp_path / "none")
    with pytest.warns(UserWarning, match=r"could not be kept and is made anew each time: .*Permission denied"):
        assert_same(first, open_index(folder, cache_dir=tmp_path / "none"))


@pytest.mark.parametrize("keep", [0, 10, 40, 200, -1])
def test_a_damaged_cache_is_made_again(folder: Path, keep: int) -> None:
    first = open_index(folder)
    for damaged in ((folder / CACHE_NAME).read_bytes()[:keep], b"something else entirely" * 100):
        (folder / CACHE_NAME).unlink()  # never overwritten in place: `first` is mapped from it
        (folder / CACHE_NAME).write_bytes(damaged)
        assert_same(first, open_index(folder))


def test_a_change_during_the_scan_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"changed while it was read.*run again"):
        open_index(folder, progress=lambda done, total: CHANGES["add"](folder))


def test_progress_ends_at_the_number_of_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_CHUNK", 2)
    seen = []
    open_index(folder, progress=lambda *numbers: seen.append(numbers))
    assert seen == [(2, 9), (4, 9), (6, 9), (8, 9), (9, 9)]


def open_together(folder, barrier, answers):
    barrier.wait()
    made = open_index(folder)
    answers.put((made.digest, made.paths(np.arange(len(made)))))


def test_four_processes_at_once_agree(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.Queue()
    for _ in range(4):
        context.Process(target=open_together, args=(folder, barrier, answers), daemon=True).start()
    given = [answers.get(timeout=60) for _ in range(4)]
    made = open_index(folder)
    assert given == [(made.digest, made.paths(np.arange(len(made))))] * 4
    assert [path.name for path in folder.iterdir() if path.name.startswith(CACHE_NAME)] == [CACHE_NAME]


def test_imagenet_sized_index_opens_at_once(tmp_path: Path) -> None:
    """1.28 million rows without files: the table alone. Measured 3 ms and 0.3 MB; the limits are for a busy machine."""
    classes = tuple(f"n{label:08d}" for label in range(1000))
    for name in classes:
        (tmp_path / name).mkdir()
    files = [f"{name}/{name}_{number}.JPEG" for name in classes for number in range(1281)]
    rows = np.random.default_rng(0).integers(1, 900, (len(files), 3))
    rows_of_all = table.assemble(tmp_path, classes, np.repeat(np.arange(1000), 1281), rows, files)
    stamps = {name: os.stat(tmp_path / name).st_mtime_ns for name in classes}
    table.store(tmp_path / CACHE_NAME, rows_of_all, stamps, lambda *_: True)
    tracemalloc.start()
    begun = time.perf_counter()
    made, took = open_index(tmp_path), time.perf_counter() - begun
    assert took < 1 and tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    assert_same(made, rows_of_all)
    assert made.path(len(made) - 1) == str(tmp_path / files[-1])


WHOLE = image_bytes((200, 150), quality=95)
BAD = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "text": (b"<html>404 Not Found</html>" * 10, "is not an image"),
    "half": (WHOLE[: len(WHOLE) // 2], "is cut short .it has no end marker"),
    "header": (WHOLE[:300], "is cut short"),
    "no end": (WHOLE[:-2], "is cut short"),  # DALI does not forgive it
    # Cut within 4 KB of the header, whose EXIF thumbnail has an end marker of its own.
    "thumbnail": (image_bytes((200, 150), exif=b"Exif\0\0" + image_bytes((16, 16)))[:3000], "is cut short"),
    "marker": (WHOLE[:2], "is not an image"),
    "gif": (image_bytes((20, 20), "GIF"), "is a GIF, which DALI cannot decode .convert it to JPEG or PNG"),
    "half png": (image_bytes((90, 90), "PNG")[:-5000], "cannot be decoded"),
    "half webp": (image_bytes((90, 90), "WEBP")[:-500], "cannot be decoded|is not an image"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_with_what_is_wrong(folder: Path, kind: str) -> None:
    content, reason = BAD[kind]
    (folder / "b" / "5.JPEG").write_bytes(content)
    with pytest.raises(DataError, match=rf"b/5\.JPEG {reason}.*: repair or remove, then run again") as caught:
        open_index(folder)
    assert "\n" not in str(caught.value) and not (folder / CACHE_NAME).exists()


def test_all_bad_files_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/m.jpg", "b/0.jpg"):
        (folder / name).write_bytes(b"")
    (folder / "b" / "gone.jpg").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"a/m\.jpg is empty \(0 bytes\) \(2 more files are bad\)"):
        open_index(folder)
    monkeypatch.setattr(jpeg, "measure", lambda _: (folder / "b").read_bytes())
    with pytest.raises(DataError, match=r"a/m\.jpg cannot be read \(Is a directory\) \(11 more files are bad\)"):
        open_index(folder)


TURNED = Image.Exif()
TURNED[0x0112] = 6
SOUND = {
    "trailer": WHOLE + bytes(9000),  # hides the end marker: decoded, and sound
    "progressive": image_bytes((300, 200), progressive=True),
    "long exif": image_bytes((300, 200), exif=b"Exif\0\0" + bytes(60000)),  # the frame lies behind the first read
    "fill bytes": WHOLE[:2] + b"\xff" + WHOLE[2:],
    "turned": image_bytes((70, 20), exif=TURNED),  # sizes are as stored
    "png": image_bytes((33, 44), "PNG"),
    "tiff": image_bytes((33, 44), "TIFF"),
}


@pytest.mark.parametrize("kind", SOUND)
def test_sound_files_of_any_name_are_measured(folder: Path, kind: str) -> None:
    (folder / "b" / "5.JPEG").write_bytes(SOUND[kind])
    assert_is_image_folder(open_index(folder), folder)


def test_a_whole_jpeg_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg, "_ask_pillow", lambda *_: pytest.fail("asked Pillow"))
    for whole in (WHOLE, SOUND["long exif"], SOUND["fill bytes"], SOUND["progressive"]):
        assert jpeg.measure(io.BytesIO(whole))[2] == len(whole)


def test_folders_that_are_no_data_set(folder: Path, tmp_path: Path) -> None:
    def refused(path: Path, match: str) -> None:
        with pytest.raises(DataError, match=match) as caught:
            open_index(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    refused(tmp_path / "nowhere", "does not exist: give a folder")
    refused(folder / "list.csv", "is not a folder: give a folder")
    refused(folder / "b", r"holds 3 images outside any class folder, 1\.JpEg first: move them")
    (tmp_path / "bare" / ".git").mkdir(parents=True)
    refused(tmp_path / "bare", "has no class folders: it must hold one folder per class")
    (folder / "a" / "deep" / "round").symlink_to(folder / "a")
    refused(folder, "a/deep/round is a link to a folder that holds it: remove the link")
    (folder / "a" / "deep" / "round").unlink()
    for name, match in (("empty", "data/empty has"), ("empty2", "data/empty and 1 more class folders have")):
        (folder / name).mkdir()
        refused(folder, f"{match} no images .*: fill or remove them")


def test_classes_of_both_splits(folder: Path, tmp_path: Path) -> None:
    train = open_index(folder)
    shutil.copytree(folder, tmp_path / "val", symlinks=True)
    check_same_classes(train, open_index(tmp_path / "val"))
    shutil.rmtree(tmp_path / "val" / "a-b")
    (tmp_path / "val" / "b").rename(tmp_path / "val" / "zebra")
    with pytest.raises(DataError, match=r"data has 3 classes, .*val has 2: .*val lacks a-b, b; .*data lacks zebra;"):
        check_same_classes(train, open_index(tmp_path / "val"))
    assert index._some(list("abcdefg")) == "a, b, c, d, e and 2 more"


def test_find_split(folder: Path) -> None:
    assert find_split(folder, None, ("train", "b", "a")) == folder / "b"
    assert find_split(folder, "a", ("train", "b")) == folder / "a"
    with pytest.raises(DataError, match=r"data has no folder train or val; it has a, a-b, b: name one"):
        find_split(folder, None, ("train", "val"))
    with pytest.raises(DataError, match=r"data has no folder test; it has a, a-b, b"):
        find_split(folder, "test", ("a",))
