"""What `prepare` refuses: one line that names the file or the option and the remedy, and nothing written."""

from __future__ import annotations

import builtins
import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import layouts
import pytest
from layouts import Content, drawn, jpeg

from trainer.data.index import DataError
from trainer.data.prepare.matfile import read_synsets
from trainer.data.prepare.run import Options, prepare
from trainer.data.prepare.transcode import Encoding

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"


@pytest.fixture(scope="module")
def content() -> Content:
    return drawn(3, 4, 2)


@pytest.fixture(scope="module")
def originals(content: Content, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    for name, build in layouts.LAYOUTS.items():
        build(root / name, content)
    return root


def shorten(file: str, size: int) -> Callable[[Path], None]:
    """Cut a file at `size` bytes, from the end where negative."""

    def spoil(root: Path) -> None:
        data = (root / file).read_bytes()
        (root / file).write_bytes(data[:size])

    return spoil


def edit(file: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda root: (root / file).write_text(change((root / file).read_text()))


def remove(file: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / file) if (root / file).is_dir() else (root / file).unlink()


def new_devkit(change: Callable[[str], str]) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        wnids = {wnid: number for number, wnid in enumerate(["n01440764", "n02440767", "n03440770"], 1)}
        layouts.devkit(root, change("1\n2\n3\n1\n2\n3\n"), layouts.meta(wnids, dict.fromkeys(wnids, "x")))

    return spoil


def twice_inside(root: Path) -> None:
    """The first inner tar once more: the archive's end is 10 KB of zeros at most, so the copy goes before them."""
    data = (root / TRAIN).read_bytes()
    first = 512 + int(data[124:135], 8)
    (root / TRAIN).write_bytes(data[:first] + data)


def bad_label(root: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = root / "data" / "train-00001-of-00002.parquet"
    table = pyarrow.parquet.read_table(path)
    labels = table["label"].to_pylist()
    labels[3] = 3
    at = table.schema.get_field_index("label")
    pyarrow.parquet.write_table(table.set_column(at, "label", pyarrow.array(labels)), path)


def other_columns(root: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"img": ["a"], "fine_label": [1]})
    pyarrow.parquet.write_table(table, root / "data" / "train-00000-of-00002.parquet")


# layout, what is spoilt, what the message says: the file or class, and the remedy
SPOILT = [
    ("archives", remove(DEVKIT), rf"lacks {DEVKIT} .*put it beside the other archives"),
    ("archives", remove(VAL), rf"lacks {VAL} .*put it beside"),
    ("archives", shorten(TRAIN, 20_000), rf"{TRAIN} is cut short .*download it again"),
    ("archives", shorten(TRAIN, -9_000), rf"{TRAIN} is cut short|{TRAIN} lacks"),
    ("archives", shorten(VAL, 3_000), rf"{VAL} is cut short in ILSVRC2012_val_0000000\d.JPEG .*download it again"),
    ("archives", shorten(DEVKIT, 300), rf"{DEVKIT} is cut short or damaged .*download it again"),
    ("archives", twice_inside, rf"{TRAIN} holds n03440770.tar twice"),
    ("archives", new_devkit(lambda truth: truth[:-2]), "holds 6 images, the devkit's ground truth 5 lines"),
    ("archives", new_devkit(lambda truth: truth.replace("3", "9")), "ground truth holds class 9, which meta.mat lacks"),
    ("archives", new_devkit(lambda truth: truth.replace("3", "three")), "ground truth is not one number a line"),
    ("kaggle", remove("LOC_val_solution.csv"), "lacks LOC_val_solution.csv: put it there"),
    ("kaggle", edit("LOC_val_solution.csv", lambda t: t.replace("ImageId", "Id")), "LOC_val_solution.csv .*without"),
    ("kaggle", edit("LOC_synset_mapping.txt", lambda t: t + t), "lists the class n01440764 twice"),
    ("kaggle", edit("LOC_synset_mapping.txt", lambda t: t + "n09 new\n"), "n09 is listed there but no folder"),
    ("kaggle", remove("ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000003.JPEG"), "val_00000003.JPEG is listed but not"),
    ("tiny", remove("wnids.txt"), "lacks wnids.txt"),
    ("tiny", remove("train/n02440767"), "do not name the same classes: n02440767"),
    ("tiny", remove("train/n02440767/images"), "n02440767/images has no images"),
    ("tiny", edit("val/val_annotations.txt", lambda t: t + "val_0.JPEG\tn01440764\n"), "lists val_0.JPEG twice"),
    (
        "tiny",
        edit("val/val_annotations.txt", lambda t: t.replace("n01440764", "n7")),
        "names the class n7, which has no",
    ),
    ("tiny", edit("val/val_annotations.txt", lambda t: t.replace("\t", " ")), "not FILE, tab, WNID"),
    ("folder", remove("val/n02440767"), "n02440767 is not in both"),
    ("folder", lambda root: (root / "train" / "a.jpg").write_bytes(b""), "1 images outside any class folder, a.jpg"),
    ("folder", lambda root: [p.unlink() for p in (root / "train" / "n01440764").iterdir()], "n01440764 has no images"),
    ("parquet", bad_label, r"train-00001-of-00002.parquet row 3 has the label 3, outside 0 .. 2"),
    ("parquet", other_columns, r"has the columns img \(string\), fine_label \(int64\): it needs image"),
    ("parquet", remove("data/train-00001-of-00002.parquet"), "lacks train-00001-of-00002.parquet .1 of 2 missing"),
    ("parquet", shorten("data/train-00000-of-00002.parquet", 900), "train-00000-of-00002.parquet is cut short or no"),
    ("parquet", lambda root: [p.unlink() for p in (root / "data").glob("val*")], "holds the splits train: it needs"),
]


@pytest.mark.parametrize("layout, spoil, message", SPOILT, ids=[f"{s[0]}-{at}" for at, s in enumerate(SPOILT)])
def test_a_spoilt_source(
    layout: str, spoil: Callable[[Path], None], message: str, originals: Path, tmp_path: Path
) -> None:
    shutil.copytree(originals / layout, tmp_path / "source")
    spoil(tmp_path / "source")
    with pytest.raises(DataError, match=message) as caught:
        prepare(tmp_path / "source", tmp_path / "to", Options(workers=1))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "to").glob("report.json"))


def test_an_archive_cut_at_a_member_is_noticed(originals: Path, tmp_path: Path) -> None:
    """Where only the end marker is lost, tarfile itself says nothing."""
    shutil.copytree(originals / "archives", tmp_path / "source")
    data = (tmp_path / "source" / VAL).read_bytes()
    (tmp_path / "source" / VAL).write_bytes(data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512))
    with pytest.raises(DataError, match=rf"{VAL} is cut short .*before its end marker"):
        prepare(tmp_path / "source", tmp_path / "to")


def test_a_damaged_inner_archive_stops_and_goes_on_when_repaired(originals: Path, tmp_path: Path) -> None:
    shutil.copytree(originals / "archives", tmp_path / "source")
    whole = (tmp_path / "source" / TRAIN).read_bytes()
    at = whole.index(b"n02440767_10.JPEG")
    (tmp_path / "source" / TRAIN).write_bytes(whole[: at + 150] + b"9" + whole[at + 151 :])
    with pytest.raises(DataError, match=r"n02440767.tar is damaged at byte 0"):
        prepare(tmp_path / "source", tmp_path / "to", Options(workers=1))
    (tmp_path / "source" / TRAIN).write_bytes(whole)
    assert prepare(tmp_path / "source", tmp_path / "to", Options(workers=1)).report["problems"] == []


@pytest.mark.parametrize("layout", ["kaggle", "parquet"])
def test_two_classes_of_one_name(layout: str, content: Content, tmp_path: Path) -> None:
    if layout == "kaggle":
        root = layouts.kaggle(tmp_path / "source", content)
        with open(root / "LOC_synset_mapping.txt", "a") as file:
            file.write(f"{content.classes[0]} again\n")
    else:
        root = layouts.parquet(tmp_path / "source", content, ["crane", "tench", "crane"])
    with pytest.raises(DataError, match=r"twice|two classes 'crane'"):
        prepare(root, tmp_path / "to")


@pytest.mark.parametrize(
    "options, message",
    [
        (Options(encoding=Encoding(max_side=9, short_side=9)), "--max-side 9 and --short-side 9: give one of them"),
        (Options(encoding=Encoding(max_side=9, quality=0)), r"--quality 0 is outside 1 \.\. 100"),
        (Options(encoding=Encoding(quality=101)), r"--quality 101 is outside 1 \.\. 100"),
        (Options(encoding=Encoding(short_side=0)), "--short-side 0 is no size"),
        (Options(format="lmdb"), "--format lmdb is not known: use folder or shards"),
        (Options(format="shards", shard_mb=0), "--shard-mb 0 is too small"),
        (Options(workers=0), "--workers 0 is too small"),
    ],
)
def test_options(options: Options, message: str, originals: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        prepare(originals / "tiny", tmp_path / "to", options)
    assert not (tmp_path / "to").exists()


def test_an_unknown_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source .*/nowhere does not exist: give the folder"):
        prepare(tmp_path / "nowhere", tmp_path / "to")
    (tmp_path / "odd" / "pictures").mkdir(parents=True)
    (tmp_path / "odd" / "labels.csv").write_text("")
    with pytest.raises(DataError, match=rf"looked for {TRAIN} .*Kaggle.*parquet.*; it holds labels.csv, pictures/"):
        prepare(tmp_path / "odd", tmp_path / "to")
    with pytest.raises(DataError, match=r"labels.csv is a file"):
        prepare(tmp_path / "odd" / "labels.csv", tmp_path / "to")


def test_a_destination_that_is_taken(originals: Path, tmp_path: Path) -> None:
    source = originals / "folder"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(DataError, match=r"holds something else \(thesis.tex\): choose another"):
        prepare(source, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(DataError, match=r"is a file"):
        prepare(source, tmp_path / "mine" / "thesis.tex")
    for inside in (source, source / "train", source / "val" / "copies"):
        with pytest.raises(DataError, match="lies among the images"):
            prepare(source, inside)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("[1]")
    with pytest.raises(DataError, match=r"report.json exists and is not a report of ours"):
        prepare(source, tmp_path / "report")


def test_an_unfinished_destination_takes_the_same_command_only(originals: Path, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    shutil.copytree(originals / "folder", tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "source", tmp_path / "to", Options(workers=1), progress=stop)
    with pytest.raises(DataError, match=r"with --max-side left out, now 64: repeat that command"):
        prepare(tmp_path / "source", tmp_path / "to", Options(encoding=Encoding(max_side=64)))
    (tmp_path / "source" / "train" / "n01440764" / "new.jpg").write_bytes(jpeg(1))
    with pytest.raises(DataError, match=r"of other content"):
        prepare(tmp_path / "source", tmp_path / "to", Options(workers=1))


def test_parquet_without_pyarrow(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: object) -> object:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(DataError, match=r"pip install imagenet-trainer\[parquet\]"):
        prepare(originals / "parquet", tmp_path / "to")


def test_meta_mat() -> None:
    numbers, words = {"n2": 1, "n1": 2}, {"n1": "tench, naïve", "n2": "a"}
    for compress in (True, False):
        found = read_synsets(layouts.meta(numbers, words, compress))
        assert [(s.number, s.wnid, s.words) for s in found] == [(1, "n2", "a"), (2, "n1", "tench, naïve")]
    whole = layouts.meta(numbers, words)
    with pytest.raises(ValueError, match="no MATLAB level 5 file"):
        read_synsets(b"PK" + bytes(200))
    for size in range(129, len(whole) - 1, 7):
        with pytest.raises(ValueError):
            read_synsets(whole[:size])
    plain = layouts.meta(numbers, words, compress=False)
    for size in range(129, len(plain) - 1, 13):
        with pytest.raises(ValueError):
            read_synsets(plain[:size])


def test_the_kaggle_list_is_read_as_it_comes(originals: Path) -> None:
    """A guard of the builder itself: header, any order, boxes behind the class."""
    with open(originals / "kaggle" / "LOC_val_solution.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["ImageId", "PredictionString"] and rows[1][0] == "ILSVRC2012_val_00000006"
