"""WebDataset shards: the same rows, batches and pixels as the folder they were made from."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import webdataset
from test_loader import configure, rank, steps

from trainer.config import Config
from trainer.data import shards
from trainer.data.index import open_index, open_shards
from trainer.data.loader import EvaluationBatches, open_data
from trainer.data.table import DataError


@pytest.fixture
def sharded(tiny: Path, tmp_path: Path) -> Path:
    """`tiny` as shards, written by the webdataset package."""
    for split in ("train", "val"):
        index = open_index(tiny / split)
        pattern = str(tmp_path / f"{split}-%06d.tar")
        with webdataset.ShardWriter(pattern, maxcount=10, verbose=0) as writer:
            for row in range(len(index)):
                image = Path(index.path(row)).read_bytes()
                writer.write({"__key__": f"{row:06d}", "jpg": image, "cls": int(index.labels[row])})
    names = {str(i): [name, name] for i, name in enumerate(open_index(tiny / "train").classes)}
    (tmp_path / "class_index.json").write_text(json.dumps(names))
    return tmp_path


def test_rows_are_those_of_the_folder(tiny: Path, sharded: Path) -> None:
    folder, index = open_index(tiny / "train"), open_shards(sharded, "train")
    assert index.classes == folder.classes and len(index.shard_files) == 5
    for column in ("labels", "widths", "heights", "sizes"):
        assert (getattr(index, column) == getattr(folder, column)).all(), column
    rows = [47, 3, 10]
    for row, encoded in zip(rows, index.encoded(torch.tensor(rows).numpy())):
        assert encoded.tobytes() == Path(folder.path(row)).read_bytes()
    assert index.path(10).endswith("train-000001.tar/000010.jpg")


def test_batches_are_those_of_the_folder(tiny: Path, sharded: Path) -> None:
    from_folder = steps(configure(tiny), rank(0, 1), 0, 3)
    from_shards = steps(configure(sharded), rank(0, 1), 0, 3)
    assert all(torch.equal(a, b) for x, y in zip(from_folder, from_shards) for a, b in zip(x, y))
    config: Config = configure(sharded)
    index = open_data(config, rank(0, 1)).val
    labels = torch.cat([labels for _, labels in EvaluationBatches(config, index, rank(0, 1), 4)])
    assert labels.tolist() == open_index(tiny / "val").labels.tolist()


def test_reopening_reads_no_shard(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_shards(sharded, "train")
    monkeypatch.setattr(shards, "scan", lambda *_: pytest.fail("scanned again"))
    assert open_shards(sharded, "train").digest == first.digest
    monkeypatch.undo()
    (sharded / "train-000004.tar").unlink()
    assert len(open_shards(sharded, "train")) == 40


@pytest.mark.parametrize("cut", [100, 700, 9000])
def test_a_shard_cut_short_is_named(sharded: Path, cut: int) -> None:
    victim = sharded / "train-000002.tar"
    os.truncate(victim, cut)
    with pytest.raises(DataError, match=r"train-000002\.tar is cut short") as error:
        open_shards(sharded, "train")
    assert "\n" not in str(error.value)


def test_no_end_of_archive_is_cut_short(sharded: Path) -> None:
    victim = sharded / "train-000002.tar"
    content = victim.read_bytes().rstrip(b"\0")
    victim.write_bytes(content + bytes(-len(content) % 512))
    with pytest.raises(DataError, match=r"train-000002\.tar is cut short \(it has no end"):
        open_shards(sharded, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.pop("3"), r"has label 3, but .*class_index\.json names 3 classes"),
        (lambda table: table.update({"2": ["class0", "x"]}), r"gives the name class0 to two classes"),
        (lambda table: table.pop("1"), r"class_index\.json is not .* without a gap"),
    ],
)
def test_class_names_must_fit(sharded: Path, change, message: str) -> None:
    path = sharded / "class_index.json"
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))
    with pytest.raises(DataError, match=message):
        open_shards(sharded, "train")


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"cls": b"cat"}, r"bad\.cls holds b'cat', not a label"),
        ({"cls": b"-1"}, r"not a label from 0 on"),
        ({}, r"bad\.jpg has no label"),
        ({"jpg": b"", "cls": b"0"}, r"bad\.jpg is empty"),
        ({"jpg": b"hello", "cls": b"0"}, r"bad\.jpg is not an image"),
    ],
)
def test_unsound_samples_are_named(tiny: Path, tmp_path: Path, sample: dict, message: str) -> None:
    sound = Path(open_index(tiny / "train").path(0)).read_bytes()
    with webdataset.TarWriter(str(tmp_path / "train-000000.tar"), encoder=False) as writer:
        writer.write({"__key__": "good", "jpg": sound, "cls": b"0"})
        writer.write({"__key__": "bad", "jpg": sound} | sample)
    with pytest.raises(DataError, match=message):
        open_shards(tmp_path, "train")


def test_an_image_that_does_not_decode_is_named_by_shard_and_row(sharded: Path) -> None:
    index = open_shards(sharded, "train")
    with open(sharded / "train-000001.tar", "r+b") as file:
        status = os.stat(file.fileno())
        file.seek(int(index.positions[13]))
        file.write(b"no image" * 10)
    os.utime(sharded / "train-000001.tar", ns=(status.st_atime_ns, status.st_mtime_ns))  # as a failing disk would
    with pytest.raises(DataError, match=r"train-000001\.tar/000013\.jpg \(row 13, class class1\) cannot be decoded"):
        steps(configure(sharded), rank(0, 1), 0, 3)
