"""`inspect`: each fault is found in the file that has it, and only what training cannot read makes the set unsound."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import layouts
import pytest
from layouts import drawn, jpeg
from PIL import Image

from trainer.data import inspection
from trainer.data.index import DataError, open_index
from trainer.data.inspection import KINDS, inspect_data
from trainer.data.prepare import faults
from trainer.data.prepare.run import Options, prepare

CLASS = "n01440764"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return layouts.image_folder(tmp_path / "set", drawn(3, 12, 4))


def found(outcome: inspection.Inspection) -> dict[str, list[str]]:
    return {kind: [entry["file"] for entry in value["files"]] for kind, value in outcome.report["findings"].items()}


def png() -> bytes:
    text = io.BytesIO()
    Image.new("RGB", (20, 20), (9, 90, 200)).save(text, "PNG")
    return text.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(71, exif=exif)


def tableless() -> bytes:
    """Whole by its header and its end, but without the tables to make pixels with: they are comments now."""
    data = bytearray(jpeg(72))
    while (at := data.find(b"\xff\xdb")) >= 0:
        data[at : at + 2] = b"\xff\xfe"
    return bytes(data)


FAULTS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "zero-byte": ("a.jpg", bytes),
    "truncated": ("a.jpg", lambda: jpeg(70)[:-80]),
    "truncated header": ("a.jpg", lambda: jpeg(70)[:100]),
    "truncated PNG": ("a.png", lambda: png()[:-30]),
    "not an image": ("a.jpg", lambda: b"<html>404 Not Found</html>" * 9),
    "not a JPEG": ("a.JPEG", png),
    "CMYK": ("a.jpg", lambda: jpeg(70, mode="CMYK")),
    "grey": ("a.jpg", lambda: jpeg(70, mode="L")),
    "EXIF-rotated": ("a.jpg", turned),
    "giant": ("a.jpg", lambda: jpeg(70, (5000, 4001), "L", quality=20)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_in_its_file(fault: str, root: Path) -> None:
    kind = {"truncated header": "truncated", "truncated PNG": "truncated"}.get(fault, fault)
    name, make = FAULTS[fault]
    (root / "train" / CLASS / name).write_bytes(make())
    outcome = inspect_data(root, workers=1)
    wanted = {kind: [f"train/{CLASS}/{name}"]} | ({"grey": [f"train/{CLASS}/{name}"]} if fault == "giant" else {})
    assert found(outcome) == wanted
    assert outcome.sound == (not KINDS[kind])
    assert kind in outcome.table and f"train/{CLASS}/{name}" in outcome.table
    assert outcome.table.endswith("sound" if outcome.sound else "training would stop")
    # Sound or not as training itself would find it.
    if outcome.sound:
        assert len(open_index(root / "train")) == 40
    else:
        with pytest.raises(DataError, match=name):
            open_index(root / "train")


def test_only_decoding_finds_broken_pixels(root: Path) -> None:
    (root / "val" / CLASS / "b.jpg").write_bytes(tableless())
    assert inspect_data(root, workers=1).sound
    outcome = inspect_data(root, decode=True, workers=1)
    assert found(outcome) == {"undecodable": [f"val/{CLASS}/b.jpg"]} and not outcome.sound
    assert "every pixel read" in outcome.table


def test_a_sound_set(root: Path) -> None:
    calls = []
    outcome = inspect_data(root, decode=True, workers=2, progress=lambda *call: calls.append(call))
    assert outcome.sound and not outcome.report["findings"]
    assert "train: 39 images in 3 classes\nval: 12 images in 3 classes\nsound" in outcome.table
    assert json.loads((root / "report.json").read_text())["inspection"] == outcome.report
    assert calls[-1] == ("inspecting", 51, 51, 51)


def test_duplicates_between_the_splits(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = (root / "train" / CLASS / "2.jpg").read_bytes()
    (root / "val" / "n02440767" / "copy.jpg").write_bytes(one)
    (root / "train" / CLASS / "twin.jpg").write_bytes(one)  # twice in one split is another matter
    # Of equal size, beginning and end, but not the same: only the whole hash tells.
    middle = len(one) // 2
    other = one[:middle] + bytes([one[middle] ^ 1]) + one[middle + 1 :]
    (root / "val" / "n02440767" / "other.jpg").write_bytes(other)
    monkeypatch.setattr(faults, "HEAD", 200)
    monkeypatch.setattr(faults, "TAIL", 100)
    hashed = []
    real = inspection._hash
    monkeypatch.setattr(inspection, "_hash", lambda job: hashed.append(job[1]) or real(job))
    outcome = inspect_data(root, workers=1)
    assert found(outcome) == {"in train and val": ["val/n02440767/copy.jpg"]}
    assert outcome.report["findings"]["in train and val"]["files"][0]["detail"] == f"is train/{CLASS}/2.jpg"
    assert sorted(name for job in hashed for name in job) == [
        f"train/{CLASS}/2.jpg",
        f"train/{CLASS}/twin.jpg",
        "val/n02440767/copy.jpg",
        "val/n02440767/other.jpg",
    ]
    assert outcome.sound


def test_classes(root: Path) -> None:
    for number in range(1, 12):
        (root / "train" / CLASS / f"{number}.jpg").unlink()
    for number in range(12, 30):
        for name in ("n02440767", "n03440770"):
            (root / "train" / name / f"{number}.jpg").write_bytes(jpeg(number + 5 * len(name)))
    outcome = inspect_data(root, workers=1)
    assert found(outcome) == {"class with few images": [f"train/{CLASS}"]} and outcome.sound
    (root / "train" / CLASS / "0.jpg").unlink()
    (root / "val" / CLASS).rename(root / "val" / "n99999999")
    outcome = inspect_data(root, workers=1)
    assert found(outcome) == {
        "class without images": [f"train/{CLASS}"],
        "class in one split only": [CLASS, "n99999999"],
    }
    assert not outcome.sound


def test_both_reports_live_in_one_file(tmp_path: Path) -> None:
    source = layouts.tiny(tmp_path / "source", drawn())
    done = prepare(source, tmp_path / "to", Options(workers=1))
    outcome = inspect_data(tmp_path / "to", workers=1)
    assert json.loads((tmp_path / "to" / "report.json").read_text()) == {
        "prepare": done.report,
        "inspection": outcome.report,
    }
    assert prepare(source, tmp_path / "to", Options(workers=1)).already
    inspect_data(tmp_path / "to", workers=1, report=tmp_path / "other.json")
    assert list(json.loads((tmp_path / "other.json").read_text())) == ["inspection"]


def test_refusals(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        inspect_data(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no folder train; it has n01440764"):
        inspect_data(root / "train")
    with pytest.raises(DataError, match=r"cannot be written .*--report FILE"):
        inspect_data(root, workers=1, report=tmp_path / "no" / "such" / "report.json")
    with pytest.raises(DataError, match="--workers 0 is too small"):
        inspect_data(root, workers=0)
    (root / "report.json").write_text("mine")
    with pytest.raises(DataError, match=r"report.json exists and is not a report of ours"):
        inspect_data(root, workers=1)
    assert (root / "report.json").read_text() == "mine"


def test_real_images_are_sound(imagenet_sample: Path, tmp_path: Path) -> None:
    root = layouts.image_folder(tmp_path / "set", layouts.real(imagenet_sample))
    outcome = inspect_data(root, decode=True, workers=2)
    assert outcome.sound
    assert set(found(outcome)) <= {"CMYK", "grey", "EXIF-rotated", "giant"}


def test_shards(root: Path, tmp_path: Path) -> None:
    (root / "val" / CLASS / "copy.jpg").write_bytes((root / "train" / CLASS / "2.jpg").read_bytes())
    (root / "train" / CLASS / "grey.jpg").write_bytes(jpeg(70, mode="L"))
    (root / "train" / CLASS / "z.jpg").write_bytes(tableless())
    home = tmp_path / "shards"
    prepare(root, home, Options("shards", workers=1))
    outcome = inspect_data(home, workers=1)
    assert outcome.sound and {kind: len(files) for kind, files in found(outcome).items()} == {
        "grey": 1,
        "in train and val": 1,
    }
    assert "train: 41 images in 3 classes\nval: 13 images in 3 classes" in outcome.table
    (name,) = found(outcome)["in train and val"]
    assert name.startswith("val-000000.tar/val_") and name.endswith("_copy.jpg")
    outcome = inspect_data(home, decode=True, workers=2)
    (name,) = found(outcome)["undecodable"]
    assert name.endswith("_z.jpg") and not outcome.sound
    shard = home / "train-000000.tar"
    whole = shard.read_bytes()
    for data, problem in ((whole[:-2000], "bytes instead of"), (whole[:700] + b"?" + whole[701:], "sha256")):
        shard.write_bytes(data)
        outcome = inspect_data(home, workers=1)
        assert found(outcome)["shard damaged"] == ["train-000000.tar"] and not outcome.sound
        assert problem in outcome.table
    shard.unlink()
    assert found(inspect_data(home, workers=1))["shard damaged"] == ["train-000000.tar"]
    (home / "val.index.json").unlink()
    with pytest.raises(DataError, match=r"val.index.json cannot be read .*prepare the shards again"):
        inspect_data(home)
