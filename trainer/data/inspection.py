"""`inspect DATASET`: is every file of an ImageFolder, or of the shards of `prepare`, sound, before it costs GPU hours.

Each file is opened once in one of several processes; with `decode` all pixels are decoded by Pillow too. Files that may
be the same in both splits (equal size, beginning and end) are hashed whole afterwards; shards are read whole anyway.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from trainer.data.index import IMAGE_SUFFIXES, DataError, find_split
from trainer.data.prepare import record, run_jobs
from trainer.data.prepare.faults import findings, marks
from trainer.data.prepare.pace import Progress

VAL_FOLDERS = ("val", "validation", "test")
INDEX = "{}.index.json"  # of the shards of a split
FEW = 0.1  # of the median class
_JOB = 256  # files a process reads between two reports
_EXAMPLES = 100  # files of a kind that the report names; all are counted
_NAMED = 2  # in the table
_CHUNK = 8 << 20
# What can be said of a file, in the order of the table; True: training cannot read it.
KINDS = {
    "shard damaged": True,
    "zero-byte": True,
    "truncated": True,
    "not an image": True,
    "undecodable": True,
    "not a JPEG": False,
    "CMYK": False,
    "grey": False,
    "EXIF-rotated": False,
    "giant": False,
    "in train and val": False,
    "class with few images": False,
    "class without images": True,
    "class in one split only": True,
}


class Seen(NamedTuple):
    """What one file is: a kind and a detail for each thing worth saying, and a mark that equal files share."""

    path: str  # relative to the data set
    mark: bytes  # empty where it could not be read
    findings: tuple[tuple[str, str], ...]
    label: str = ""  # the class; a damaged shard has none


@dataclass(frozen=True)
class Inspection:
    """The result. `report` is the part `inspection` of report.json; `sound`: training would read every file."""

    root: Path
    report: dict[str, Any]
    sound: bool

    @property
    def table(self) -> str:
        """For the console: images of each split, then a line for each kind of finding, with its first files."""
        lines = [f"{self.root}: {'every pixel' if self.report['decoded'] else 'every header'} read"]
        for split, numbers in self.report["splits"].items():
            lines.append(f"{split}: {numbers['images']:,} images in {numbers['classes']:,} classes")
        rows = [("finding", "files", "training", "for example")]
        for kind, found in self.report["findings"].items():
            effect = "stops" if KINDS[kind] else "goes on"
            files = [
                f"{entry['file']} ({entry['detail']})" if entry["detail"] else entry["file"] for entry in found["files"]
            ]
            rows.append((kind, f"{found['count']:,}", effect, ", ".join(files[:_NAMED])))
        widths = [max(map(len, column)) for column in zip(*rows)]
        for kind, number, effect, files in rows if len(rows) > 1 else ():
            cells = (kind.ljust(widths[0]), number.rjust(widths[1]), effect.ljust(widths[2]), files)
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, "sound" if self.sound else "not sound: training would stop"])


def inspect_data(
    root: str | Path,
    *,
    decode: bool = False,
    workers: int | None = None,
    report: str | Path | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Look at every file of root/train/CLASS/** and root/{val,validation,test}/CLASS/**, or of the shards in `root`.

    `workers` processes (default: one a core; 1: this one). Writes report.json in `root`, or the file `report`, with up
    to 100 files of each kind. Raises DataError where there is no such data set or the report cannot be written.
    """
    base = Path(os.path.abspath(Path(root).expanduser()))
    target = Path(os.path.abspath(Path(report).expanduser())) if report is not None else base / record.NAME
    if workers is not None and workers < 1:
        raise DataError(f"--workers {workers} is too small: give at least 1")
    record.read(target)  # something else of that name is noticed now, not after an hour
    shards = (base / INDEX.format("train")).is_file()
    images, classes, jobs = (_in_shards if shards else _in_folders)(base, decode)
    found: dict[str, list[tuple[str, str]]] = {kind: [] for kind in KINDS}
    alike: dict[str, list[tuple[bytes, str]]] = {}
    total, done = sum(images.values()), 0
    for split in images:
        counts, alike[split] = classes[split], []
        with closing(run_jobs(_look_into if shards else _look, jobs[split], workers)) as results:
            for result in results:
                for seen in result:
                    for kind, detail in seen.findings:
                        found[kind].append((seen.path, detail))
                    if seen.mark:
                        alike[split].append((seen.mark, seen.path))
                    if seen.label:
                        counts[seen.label] = counts.get(seen.label, 0) + 1
                        done += 1
                if progress is not None:
                    progress("inspecting", done, total, done)
    found["in train and val"] = _duplicates(base, alike, workers, whole=shards)
    found |= _class_findings(classes, shards)
    outcome = {
        "decoded": decode,
        "splits": {s: {"images": sum(counts.values()), "classes": len(counts)} for s, counts in classes.items()},
        "findings": {kind: _listed(entries) for kind, entries in found.items() if entries},
    }
    outcome["sound"] = not any(KINDS[kind] for kind in outcome["findings"])
    try:
        record.write(target, "inspection", outcome, target.with_name(f".{target.name}.new"))
    except OSError as error:
        raise DataError(f"{target} cannot be written ({error.strerror}): say where with --report FILE") from None
    return Inspection(base, outcome, outcome["sound"])


Work = tuple[dict[str, int], dict[str, dict[str, int]], dict[str, list[Any]]]  # of each split: images, classes, jobs


def _in_folders(base: Path, decode: bool) -> Work:
    images, classes, jobs = {}, {}, {}
    for split, folder in (("train", find_split(base, None, ("train",))), ("val", find_split(base, None, VAL_FOLDERS))):
        files = _files(base, folder)
        names = [(label, name) for label, inside in files.items() for name in inside]
        images[split], classes[split] = len(names), dict.fromkeys(files, 0)
        jobs[split] = [(str(base), names[at : at + _JOB], decode) for at in range(0, len(names), _JOB)]
    return images, classes, jobs


def _in_shards(base: Path, decode: bool) -> Work:
    images, classes, jobs = {}, {}, {}
    for split in ("train", "val"):
        path = base / INDEX.format(split)
        try:
            index = json.loads(path.read_text())
            images[split], classes[split] = index["samples"], dict.fromkeys(index["classes"], 0)
            jobs[split] = [(str(base), shard, index["classes"], decode) for shard in index["shards"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error!r}): prepare the shards again") from None
    return images, classes, jobs


def _listed(found: list[tuple[str, str]]) -> dict[str, Any]:
    files = [{"file": path, "detail": detail} for path, detail in found[:_EXAMPLES]]
    return {"count": len(found), "files": files}


def _files(base: Path, folder: Path) -> dict[str, list[str]]:
    """The images of each class, relative to the data set, as training lists them."""
    try:
        classes = sorted(
            entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")
        )
        if not classes:
            raise DataError(f"{folder} has no class folders: it must hold one folder per class, with the images in it")
        found = {}
        for name in classes:
            found[name] = []
            for here, inner, files in os.walk(folder / name, followlinks=True, onerror=_refuse):
                inner[:] = sorted(entry for entry in inner if not entry.startswith("."))
                shown = [file for file in files if not file.startswith(".") and file.lower().endswith(IMAGE_SUFFIXES)]
                found[name] += [os.path.relpath(os.path.join(here, file), base) for file in sorted(shown)]
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be listed ({error.strerror}): make it readable") from None
    return found


def _refuse(error: OSError) -> None:
    raise error


def _look(job: tuple[str, list[tuple[str, str]], bool]) -> list[Seen]:
    """In a worker: what each file of a job is."""
    root, names, decode = job
    seen = []
    for label, name in names:
        try:
            with open(os.path.join(root, name), "rb", buffering=0) as file:
                seen.append(Seen(name, marks(file), tuple(findings(file, decode)), label))
        except OSError as error:
            seen.append(Seen(name, b"", (("undecodable", f"cannot be read: {error.strerror}"),), label))
    return seen


def _look_into(job: tuple[str, dict[str, Any], list[str], bool]) -> list[Seen]:
    """In a worker: what each image of a shard is, and whether the shard is what its index says."""
    root, shard, classes, decode = job
    name, seen = shard["name"], []
    try:
        problem = _shard_problem(Path(root) / name, shard)
        with tarfile.open(os.path.join(root, name), "r:") as tar:
            for key, suffix, data, label in _samples(tar):
                if not 0 <= label < len(classes):
                    raise ValueError(f"{key}.cls holds {label}, outside 0 .. {len(classes) - 1}")
                file = io.BytesIO(data)
                mark = hashlib.sha256(data).digest() if data else b""
                seen.append(Seen(f"{name}/{key}.{suffix}", mark, tuple(findings(file, decode)), classes[label]))
        if len(seen) != shard["samples"]:
            problem = problem or f"{len(seen)} images instead of {shard['samples']}"
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        problem = " ".join(str(error).split()) or type(error).__name__
    return [*seen, Seen(name, b"", (("shard damaged", problem),))] if problem else seen


def _shard_problem(path: Path, shard: dict[str, Any]) -> str:
    """What distinguishes a shard from its line in the index; empty where nothing does."""
    if path.stat().st_size != shard["bytes"]:
        return f"{path.stat().st_size:,} bytes instead of {shard['bytes']:,}"
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(_CHUNK):
            digest.update(data)
    return "" if digest.hexdigest() == shard["sha256"] else "other bytes than its index says (sha256)"


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, str, bytes, int]]:
    """(key, suffix, bytes, label) of each sample; an image and its .cls stand together, as `prepare` writes them."""
    image = None
    for member in tar:
        key, _, suffix = member.name.rpartition(".")
        data = tar.extractfile(member).read()
        if suffix != "cls":
            image = (key, suffix, data)
        elif image is not None and image[0] == key:
            yield *image, int(data)


def _duplicates(
    base: Path, marked: dict[str, list[tuple[bytes, str]]], workers: int | None, whole: bool
) -> list[tuple[str, str]]:
    """(file of val, the same file of train), by the hash of all bytes, which the marks are, or are a hint to."""
    alike = {mark for mark, _ in marked["train"]} & {mark for mark, _ in marked["val"]}
    if whole:
        first = {mark: path for mark, path in reversed(marked["train"]) if mark in alike}
        return [(path, f"is {first[mark]}") for mark, path in marked["val"] if mark in alike]
    names = {split: [path for mark, path in marked[split] if mark in alike] for split in ("train", "val")}
    hashes: dict[str, list[str]] = {}
    for split, paths in names.items():
        jobs = [(str(base), paths[at : at + _JOB]) for at in range(0, len(paths), _JOB)]
        # A few files are not worth a process.
        with closing(run_jobs(_hash, jobs, workers if len(jobs) > 1 else 1)) as results:
            hashes[split] = [digest for result in results for digest in result]
    first = {}
    for digest, path in zip(hashes["train"], names["train"]):
        first.setdefault(digest, path)
    return [(path, f"is {first[digest]}") for digest, path in zip(hashes["val"], names["val"]) if digest in first]


def _hash(job: tuple[str, list[str]]) -> list[str]:
    digests = []
    for name in job[1]:
        with open(os.path.join(job[0], name), "rb") as file:
            digests.append(hashlib.sha256(file.read()).hexdigest())
    return digests


def _class_findings(classes: dict[str, dict[str, int]], shards: bool) -> dict[str, list[tuple[str, str]]]:
    # An empty class folder stops training; in shards, where labels are numbers, a class may be empty.
    found: dict[str, list[tuple[str, str]]] = {"class with few images": [], "class without images": []}
    for split, counts in classes.items():
        middle = median(counts.values())
        for name, count in counts.items():
            if not count and not shards:
                found["class without images"].append((f"{split}/{name}", ""))
            elif count < FEW * middle:
                found["class with few images"].append((f"{split}/{name}", f"{count}, the median is {middle:g}"))
    lone = sorted(set(classes["train"]) ^ set(classes["val"]))
    found["class in one split only"] = [(name, "train" if name in classes["train"] else "val") for name in lone]
    return found
