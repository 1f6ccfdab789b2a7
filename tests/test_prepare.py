"""Any layout in, the same data set out: every image once, byte for byte, counted."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import layouts
import numpy as np
import pytest
from layouts import LAYOUTS, Content, contents, drawn, jpeg
from PIL import Image

from trainer.data.index import DataError, open_index
from trainer.data.prepare import archives, counts, run, samples
from trainer.data.prepare.run import Options, prepare
from trainer.data.prepare.transcode import Encoding, convert

FORMATS = ("folder", "shards")
ONE = {"workers": 1}


@pytest.fixture(scope="module")
def content() -> Content:
    return drawn()


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several units of work and several shards out of a few images."""
    monkeypatch.setattr(samples, "UNIT_FILES", 5)
    monkeypatch.setattr(archives, "UNIT_BYTES", 7000)
    monkeypatch.setattr(run, "_shard_number", lambda *_: 3)


def shard_samples(home: Path, split: str) -> list[dict]:
    """Read by the webdataset package, as users will."""
    import webdataset

    names = [str(home / shard["name"]) for shard in json.loads((home / f"{split}.index.json").read_text())["shards"]]
    return list(webdataset.WebDataset(names, shardshuffle=False))


def written(home: Path, format: str) -> dict[str, dict[str, list[bytes]]]:
    """{split: {class: the images' bytes, sorted}} of a destination; the label of a folder is its place."""
    classes = [name for name, _ in json.loads((home / "class_index.json").read_text()).values()]
    found = {split: {name: [] for name in classes} for split in ("train", "val")}
    for split in found:
        if format == "folder":
            assert sorted(path.name for path in (home / split).iterdir()) == classes
            for path in (home / split).glob("*/*"):
                found[split][path.parent.name].append(path.read_bytes())
        else:
            for sample in shard_samples(home, split):
                found[split][classes[int(sample["cls"])]].append(sample["jpg"])
    return {split: {name: sorted(images) for name, images in c.items()} for split, c in found.items()}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_out_the_same(
    layout: str, format: str, content: Content, tmp_path: Path, small_units: None
) -> None:
    source = LAYOUTS[layout](tmp_path / "source", content)
    before = contents(source)
    calls = []
    done = prepare(source, tmp_path / "to", Options(format, **ONE), progress=lambda *call: calls.append(call))
    assert written(tmp_path / "to", format) == content.by_class()
    assert contents(source) == before
    names = json.loads((tmp_path / "to" / "class_index.json").read_text())
    assert [names[str(label)][0] for label in range(3)] == content.classes
    if layout != "parquet":  # which has one name for a class
        assert {name: words for name, words in names.values()} == content.words
    assert done.report["images"]["train"] == {wnid: len(found) for wnid, found in content.pictures["train"].items()}
    preparing = [call for call in calls if call[0] == "preparing"]
    assert preparing[0][1] == 0 and preparing[-1][1] == preparing[-1][2] and preparing[-1][3] == 42
    assert [call[1] for call in preparing] == sorted(call[1] for call in preparing) and len(preparing) > 5
    assert not (tmp_path / "to" / ".prepare").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_real_images_pass_through(layout: str, imagenet_sample: Path, tmp_path: Path) -> None:
    real = layouts.real(imagenet_sample)
    prepare(LAYOUTS[layout](tmp_path / "source", real), tmp_path / "to", Options("folder", **ONE))
    assert written(tmp_path / "to", "folder") == real.by_class()


def test_a_folder_is_ready_to_train_from(content: Content, tmp_path: Path) -> None:
    done = prepare(layouts.archives(tmp_path / "source", content), tmp_path / "to", Options(workers=2))
    index = open_index(tmp_path / "to" / "train")
    assert index.classes == tuple(content.classes) and len(index) == 30
    one = tmp_path / "to" / "train" / content.classes[0] / f"{content.classes[0]}_17.JPEG"
    assert one.read_bytes() == content.pictures["train"][content.classes[0]][1]
    assert f"ready: folder, from the official ILSVRC2012 archives in {tmp_path / 'source'}" in done.text
    assert "train      30" in done.text and "11 (n03440770)" in done.text


def test_shards_are_fair_draws_with_an_index(tmp_path: Path) -> None:
    content = drawn(4, train=40, val=10)
    prepare(layouts.archives(tmp_path / "source", content), tmp_path / "to", Options("shards", shard_mb=1, **ONE))
    assert (tmp_path / "to" / "train-000000.tar").exists()
    again = Options("shards", Encoding(), 1, workers=1)
    assert prepare(tmp_path / "source", tmp_path / "to", again).already
    from trainer.data.prepare.writers import Item, Shards

    home = tmp_path / "many"
    (home / ".prepare").mkdir(parents=True)
    shards = Shards("train", 7)
    flat = [Item(at // 50, f"a/b.c {at}.JPEG", jpeg(at, (16, 16))) for at in range(200)]
    for begin in range(0, 200, 30):
        shards.add(home, flat[begin : begin + 30])
    assert max(shards.counts()) - min(shards.counts()) <= 1 and sum(shards.counts()) == 200
    for at in range(7):
        with tarfile.open(home / ".prepare" / shards.name(at)) as tar:
            names = tar.getnames()
            labels = [int(tar.extractfile(name).read()) for name in names if name.endswith(".cls")]
        assert len(names) == 2 * shards.counts()[at] and all(name.count(".") == 1 for name in names)
        assert set(labels) == {0, 1, 2, 3}  # although they came one class after the other


def test_a_shard_cut_short_is_noticed(content: Content, tmp_path: Path) -> None:
    source, home = layouts.tiny(tmp_path / "source", content), tmp_path / "to"
    prepare(source, home, Options("shards", **ONE))
    shard = json.loads((home / "train.index.json").read_text())["shards"][0]
    assert shard["samples"] == 30 and shard["bytes"] == (home / shard["name"]).stat().st_size
    with open(home / shard["name"], "r+b") as file:
        file.truncate(shard["bytes"] - 512)
    with pytest.raises(DataError, match=r"train-000000.tar has [\d,]+ bytes instead of"):
        prepare(source, home, Options("shards", **ONE))


@pytest.mark.parametrize("encoding", [Encoding(max_side=32), Encoding(short_side=32, quality=75), Encoding(quality=60)])
def test_copies(encoding: Encoding, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    sizes = {"wide": (80, 40), "tall": (41, 97), "small": (20, 24), "square": (64, 64)}
    pictures = [jpeg(at, size, exif=exif) for at, size in enumerate(sizes.values())] + [jpeg(9, (80, 40), "L")]
    classes = {"n00000001": pictures, "n00000002": [jpeg(50)]}
    source = layouts.image_folder(
        tmp_path / "s", Content({"train": classes, "val": classes}, dict.fromkeys(classes, "x"))
    )
    prepare(source, tmp_path / "to", Options(encoding=encoding, **ONE))
    for at, size in enumerate([*sizes.values(), (80, 40)]):
        with Image.open(tmp_path / "to" / "train" / "n00000001" / f"{at}.jpg") as copy:
            assert copy.mode == ("L" if at == 4 else "RGB") and not copy.getexif()
            side = max if encoding.max_side else min
            goal = encoding.max_side or encoding.short_side
            if not goal or side(size) <= goal:
                assert copy.size == size
            else:
                assert side(copy.size) == goal
                assert abs(copy.size[0] / copy.size[1] - size[0] / size[1]) < 0.05 * size[0] / size[1]
            with Image.open(io.BytesIO(pictures[at])) as original:  # not turned, and the same picture
                difference = np.asarray(original.convert("RGB").resize(copy.size), int) - np.asarray(
                    copy.convert("RGB"), int
                )
                assert np.abs(difference).mean() < 20  # turned, it would be about 70


@pytest.mark.parametrize("encoding", [Encoding(), Encoding(max_side=500)], ids=["bytes", "copies"])
def test_the_oddities_are_put_right_by_content(encoding: Encoding, tmp_path: Path) -> None:
    png = io.BytesIO()
    with Image.open(io.BytesIO(jpeg(3))) as picture:
        picture.convert("RGBA").save(png, "PNG")
    cmyk = jpeg(4, mode="CMYK")
    classes = {"n01": [png.getvalue(), cmyk, jpeg(5)], "n02": [jpeg(6)]}
    content = Content({"train": classes, "val": {"n01": [jpeg(7)], "n02": [jpeg(8)]}}, {"n01": "a", "n02": "b"})
    done = prepare(layouts.archives(tmp_path / "source", content), tmp_path / "to", Options(encoding=encoding, **ONE))
    assert [text.split(", now")[0] for text in done.report["put_right"]] == [
        "train/n01/n01_10.JPEG was a PNG called .JPEG",
        "train/n01/n01_17.JPEG was a CMYK JPEG",
    ]
    assert "put right: train/n01/n01_10.JPEG was a PNG" in done.text
    for name, original in (("n01_10.JPEG", png.getvalue()), ("n01_17.JPEG", cmyk)):
        with Image.open(tmp_path / "to" / "train" / "n01" / name) as new, Image.open(io.BytesIO(original)) as old:
            assert (new.format, new.mode) == ("JPEG", "RGB")
            assert np.abs(np.asarray(new, int) - np.asarray(old.convert("RGB"), int)).mean() < 5
    if encoding.passes_through:
        assert (tmp_path / "to" / "train" / "n01" / "n01_24.JPEG").read_bytes() == jpeg(5)


def test_a_png_that_says_so_passes_through() -> None:
    png = io.BytesIO()
    Image.new("RGB", (9, 9)).save(png, "PNG")
    assert convert("a.png", png.getvalue(), Encoding()) == ("a.png", png.getvalue(), None)
    assert convert("a.png", png.getvalue(), Encoding(max_side=4)).name == "a.png.JPEG"


@pytest.mark.parametrize("format", FORMATS)
def test_undecodable_images_are_named_at_the_end(format: str, content: Content, tmp_path: Path) -> None:
    source = layouts.image_folder(tmp_path / "source", content)
    victim = source / "train" / content.classes[1] / "3.jpg"
    victim.write_bytes(victim.read_bytes()[:300])
    named = rf"train/{content.classes[1]}/3.jpg .*--skip-bad"
    for _ in range(2):  # the second time from the report
        with pytest.raises(DataError, match=named):
            prepare(source, tmp_path / "to", Options(format, **ONE))
    done = prepare(source, tmp_path / "to", Options(format, skip_bad=True, **ONE))
    assert "left out, undecodable" in done.text
    wanted = content.by_class()
    wanted["train"][content.classes[1]].remove(content.pictures["train"][content.classes[1]][3])
    assert written(tmp_path / "to", format) == wanted


def test_the_official_counts() -> None:
    names = tuple(f"n{label:08}" for label in range(1000))
    train = [1300] * 895 + [732] + [0] * 104
    rest = 1_281_167 - sum(train)
    train[896:] = [rest // 104 + (at < rest % 104) for at in range(104)]
    assert counts.official_problems("train", names, train) == []
    assert counts.official_problems("val", names, [50] * 1000) == []
    train[7] -= 600
    first, second = counts.official_problems("train", names, train)
    assert first == "train/n00000007 has 700 images instead of 732 to 1,300" and "1,280,567 images" in second
    (lost,) = counts.official_problems("train", names, [*train[:7], 1299, *train[8:]])
    assert "1,281,166 images instead of 1,281,167" in lost


def test_counts_of_classes_are_checked(tmp_path: Path) -> None:
    found = samples.Source("", tmp_path, ("n1", "n2"), ("", ""), (), {"val": [3, 4]})
    assert counts.count_problems(found, {"train": [9, 9], "val": [2, 4]}, {"train": [0, 0], "val": [1, 0]}) == []
    problems = counts.count_problems(found, {"train": [9, 9], "val": [3, 3]}, {"train": [0, 0], "val": [0, 0]})
    assert problems == ["val/n2 has 3 images instead of 4"]


def test_two_images_of_one_name_are_noticed(content: Content, tmp_path: Path) -> None:
    source = layouts.image_folder(tmp_path / "source", content)
    folder = source / "train" / content.classes[1]
    (folder / "a").mkdir()
    for name in ("a/b.jpg", "a__b.jpg"):
        (folder / name).write_bytes(jpeg(1))
    with pytest.raises(DataError, match=rf"{content.classes[1]} holds 11 files .* two images had one name"):
        prepare(source, tmp_path / "to", Options(**ONE))


def test_parquet_names(content: Content, tmp_path: Path) -> None:
    words = ["tench, Tinca tinca", "goldfish", "crane"]  # sorted, they would change places
    done = prepare(layouts.parquet(tmp_path / "a", content, words, None), tmp_path / "words", Options(**ONE))
    names = json.loads((tmp_path / "words" / "class_index.json").read_text())
    assert names == {str(label): [f"class{label:04}", word] for label, word in enumerate(words)}
    images = written(tmp_path / "words", "folder")["val"]
    assert list(images.values()) == list(content.by_class()["val"].values()) and done.report["notes"]
    prepare(layouts.parquet(tmp_path / "b", content, [], "{at}.png"), tmp_path / "none", Options(**ONE))
    assert list(written(tmp_path / "none", "folder")["train"]) == ["class0000", "class0001", "class0002"]
    # As in imagenet-1k: words in the schema, and the WordNet id last in the name of each image.
    hub = layouts.parquet(tmp_path / "c", content, words, "{wnid}_1{at}_{wnid}.JPEG")
    done = prepare(hub, tmp_path / "hub", Options(**ONE))
    assert written(tmp_path / "hub", "folder") == content.by_class() and not done.report["notes"]
    names = json.loads((tmp_path / "hub" / "class_index.json").read_text())
    assert list(names.values()) == [list(entry) for entry in zip(content.classes, words)]
