"""Small data sets in the exact layouts in which ImageNet and Tiny-ImageNet come, for the tests of `prepare`."""

from __future__ import annotations

import csv
import io
import json
import struct
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

Pictures = dict[str, dict[str, list[bytes]]]  # split: {wnid: the images' bytes}


@dataclass(frozen=True)
class Content:
    """What a data set holds, whatever the layout: distinct JPEGs and the words of each class."""

    pictures: Pictures
    words: dict[str, str]

    @property
    def classes(self) -> list[str]:
        return sorted(self.words)

    def validation(self) -> list[tuple[str, bytes]]:
        """(wnid, bytes), the classes mixed."""
        flat = [(at, wnid, data) for wnid in self.classes for at, data in enumerate(self.pictures["val"][wnid])]
        return [(wnid, data) for _, wnid, data in sorted(flat, key=lambda entry: entry[0])]

    def by_class(self) -> dict[str, dict[str, list[bytes]]]:
        return {split: {wnid: sorted(found) for wnid, found in c.items()} for split, c in self.pictures.items()}


def jpeg(seed: int, size: tuple[int, int] = (48, 40), mode: str = "RGB", **options: object) -> bytes:
    """A drawn JPEG that no other seed draws."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
    coded = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.BICUBIC).convert(mode).save(coded, "JPEG", **{"quality": 92, **options})
    return coded.getvalue()


def drawn(classes: int = 3, train: int = 9, val: int = 4) -> Content:
    """`train` + i and `val` images of class number i."""
    wnids = [f"n{1440764 + 1000003 * number:08}" for number in range(classes)]
    pictures = {
        split: {
            wnid: [
                jpeg(10_000 * (split == "val") + 100 * at + number) for number in range(count + (split == "train") * at)
            ]
            for at, wnid in enumerate(wnids)
        }
        for split, count in (("train", train), ("val", val))
    }
    return Content(pictures, {wnid: f"thing {wnid}, Res obiecta, naïve" for wnid in wnids})


def real(folder: Path, classes: int = 100) -> Content:
    """Real ImageNet JPEGs; there is one of a class, so three wnids share three images differently in each split."""
    files = sorted(folder.glob("*/*.JPEG"))[: 3 * classes]
    wnids = sorted(path.parent.name for path in files)[:classes]
    data = [path.read_bytes() for path in files]
    pictures = {
        "train": {wnid: data[3 * at : 3 * at + 2] for at, wnid in enumerate(wnids)},
        "val": {wnid: [data[3 * at + 2]] for at, wnid in enumerate(wnids)},
    }
    return Content(pictures, {wnid: f"words of {wnid}" for wnid in wnids})


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(data), 1_340_000_000
    tar.addfile(info, io.BytesIO(data))


def _tar(path: Path | io.BytesIO, files: list[tuple[str, bytes]], mode: str = "w") -> None:
    where = {"fileobj": path} if isinstance(path, io.BytesIO) else {"name": path}
    with tarfile.open(**where, mode=mode, format=tarfile.GNU_FORMAT) as tar:
        for name, data in files:
            _add(tar, name, data)


def archives(root: Path, content: Content) -> Path:
    """ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz."""
    root.mkdir(parents=True, exist_ok=True)
    inner = []
    for wnid, found in reversed(content.pictures["train"].items()):  # the official order is not sorted either
        text = io.BytesIO()
        _tar(text, [(f"{wnid}_{10 + 7 * at}.JPEG", data) for at, data in enumerate(found)])
        inner.append((f"{wnid}.tar", text.getvalue()))
    _tar(root / "ILSVRC2012_img_train.tar", inner)
    validation = content.validation()
    _tar(
        root / "ILSVRC2012_img_val.tar",
        [(f"ILSVRC2012_val_{at:08}.JPEG", data) for at, (_, data) in enumerate(validation, 1)],
    )
    # The challenge's numbers follow no order of wnids.
    numbers = {wnid: number for number, wnid in enumerate(reversed(content.classes), 1)}
    truth = "".join(f"{numbers[wnid]}\n" for wnid, _ in validation)
    devkit(root, truth, meta(numbers, content.words))
    return root


def devkit(root: Path, truth: str, mat: bytes) -> None:
    top = "ILSVRC2012_devkit_t12"
    files = [
        ("readme.txt", b""),
        ("data/ILSVRC2012_validation_ground_truth.txt", truth.encode()),
        ("data/meta.mat", mat),
    ]
    _tar(root / f"{top}.tar.gz", [(f"{top}/{name}", data) for name, data in files], "w:gz")


def meta(numbers: dict[str, int], words: dict[str, str], compress: bool = True) -> bytes:
    """A meta.mat as MATLAB writes it: `synsets`, a struct array of the classes and of the synsets above them."""
    rows = [(number, wnid, words[wnid], 0) for wnid, number in numbers.items()]
    rows += [(len(rows) + 1, "n00001740", "entity", len(rows)), (len(rows) + 2, "n00001930", "physical entity", 1)]
    fields = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ]
    body = _element(5, struct.pack("<i", 32)) + _element(1, b"".join(name.encode().ljust(32, b"\0") for name in fields))
    for number, wnid, text, children in rows:
        body += _number([number]) + _text(wnid, 16) + _text(text, 4) + _text("what it means", 16)
        body += _number([children]) + _number(list(range(children))) + _number([3]) + _number([1300 * (not children)])
    matrix = _matrix(2, (len(rows), 1), "synsets", body)
    if compress:
        text = zlib.compress(matrix)
        matrix = struct.pack("<II", 15, len(text)) + text
    return b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(124) + struct.pack("<H", 0x0100) + b"IM" + matrix


def _element(kind: int, data: bytes) -> bytes:
    if 0 < len(data) <= 4:
        return struct.pack("<HH", kind, len(data)) + data.ljust(4, b"\0")
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def _matrix(kind: int, shape: tuple[int, int], name: str, body: bytes) -> bytes:
    flags = _element(6, struct.pack("<II", kind, 0))
    return _element(14, flags + _element(5, struct.pack("<ii", *shape)) + _element(1, name.encode()) + body)


def _number(values: list[int]) -> bytes:
    return _matrix(
        6, (1, len(values)), "", _element(4, struct.pack(f"<{len(values)}H", *values))
    )  # doubles, stored short


def _text(text: str, kind: int) -> bytes:
    return _matrix(4, (1, len(text)), "", _element(kind, text.encode("utf-16-le" if kind == 4 else "utf-8")))


def kaggle(root: Path, content: Content) -> Path:
    """ILSVRC/Data/CLS-LOC/{train/WNID,val}, LOC_val_solution.csv, LOC_synset_mapping.txt."""
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    _folders(data / "train", content.pictures["train"], "{wnid}_{at}.JPEG")
    (data / "val").mkdir()
    (data / "test").mkdir()
    (data / "test" / "ILSVRC2012_test_00000001.JPEG").write_bytes(jpeg(77_777))
    rows = []
    for at, (wnid, found) in enumerate(content.validation(), 1):
        (data / "val" / f"ILSVRC2012_val_{at:08}.JPEG").write_bytes(found)
        rows.insert(0, [f"ILSVRC2012_val_{at:08}", f"{wnid} 85 1 499 272 {wnid} 1 2 3 4 "])
    with open(root / "LOC_val_solution.csv", "w", newline="") as file:
        csv.writer(file).writerows([["ImageId", "PredictionString"], *rows])
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} {content.words[wnid]}\n" for wnid in content.classes))
    return root


def image_folder(root: Path, content: Content, val: str = "val") -> Path:
    """train/WNID/* and val/WNID/*, the words in a class_index.json; the same file names in all classes."""
    _folders(root / "train", content.pictures["train"], "{at}.jpg")
    _folders(root / val, content.pictures["val"], "{at}.jpg")
    words = {label: [wnid, content.words[wnid]] for label, wnid in enumerate(content.classes)}
    (root / "class_index.json").write_text(json.dumps(words))
    return root


def tiny(root: Path, content: Content) -> Path:
    """train/WNID/images/*.JPEG with boxes, val/images/*.JPEG with val_annotations.txt, wnids.txt, words.txt."""
    for wnid, found in content.pictures["train"].items():
        _folders(root / "train" / wnid, {"images": found}, wnid + "_{at}.JPEG")
        boxes = "".join(f"{wnid}_{at}.JPEG\t0\t10\t63\t58\n" for at in range(len(found)))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(boxes)
    validation = content.validation()
    _folders(root / "val", {"images": [data for _, data in validation]}, "val_{at}.JPEG")
    lines = "".join(f"val_{at}.JPEG\t{wnid}\t0\t32\t44\t62\n" for at, (wnid, _) in enumerate(validation))
    (root / "val" / "val_annotations.txt").write_text(lines)
    _folders(root / "test", {"images": [jpeg(99_999)]}, "test_{at}.JPEG")
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in reversed(content.classes)))
    words = {"n00001740": "entity", **content.words}
    (root / "words.txt").write_text("".join(f"{wnid}\t{text}\n" for wnid, text in words.items()))
    return root


def parquet(
    root: Path, content: Content, names: list[str] | None = None, named: str | None = "{wnid}_{at}.JPEG"
) -> Path:
    """data/train-00000-of-00002.parquet ..., validation-..., the class names in the schema's metadata."""
    import pyarrow
    import pyarrow.parquet

    names = content.classes if names is None else names
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("image", image), ("label", pyarrow.int64())])
    if names:
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (root / "data").mkdir(parents=True)
    for split, found in (("train", content.pictures["train"]), ("validation", content.pictures["val"])):
        rows = [
            {"image": {"bytes": data, "path": named and named.format(wnid=wnid, at=at)}, "label": label}
            for label, wnid in enumerate(content.classes)
            for at, data in enumerate(found[wnid])
        ]
        rows = [rows[at] for at in np.random.default_rng(5).permutation(len(rows))]
        for number in range(2):
            table = pyarrow.Table.from_pylist(rows[number::2], schema)
            path = root / "data" / f"{split}-{number:05}-of-00002.parquet"
            pyarrow.parquet.write_table(table, path, row_group_size=7)
    return root


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


LAYOUTS = {"archives": archives, "kaggle": kaggle, "folder": image_folder, "tiny": tiny, "parquet": parquet}


def _folders(root: Path, pictures: dict[str, list[bytes]], name: str) -> None:
    for wnid, found in pictures.items():
        (root / wnid).mkdir(parents=True)
        for at, data in enumerate(found):
            (root / wnid / name.format(wnid=wnid, at=at)).write_bytes(data)
