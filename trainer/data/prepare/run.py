"""`prepare`: any source to a folder or to shards, by all cores, resumed where it stopped, counted at the end.

Work is cut into units (samples.py) that are done in any order and taken in the source's. After each,
DESTINATION/.prepare says how many are taken, so a run that was killed does again at most what was under way, with the
same result. That holds for a killed process; what a power failure loses is noticed at the end (sizes of files,
checksums of shards).
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from trainer.config import RunError
from trainer.data.index import DataError
from trainer.data.jpeg import BadImage
from trainer.data.prepare import record, run_jobs, writers
from trainer.data.prepare.claim import State, check_place, finished_report, locked, same_request
from trainer.data.prepare.counts import count_problems, summary
from trainer.data.prepare.pace import Progress
from trainer.data.prepare.samples import SPLITS, Source, Unit
from trainer.data.prepare.sources import recognise
from trainer.data.prepare.transcode import Encoding, convert
from trainer.data.prepare.writers import ASIDE, Item, Shards

FORMATS = ("folder", "shards")
_VERSION = 1  # rises when the same command would write other bytes
_LISTED = 1000  # odd and bad files that the report names; all are counted


@dataclass(frozen=True)
class Options:
    """How to prepare. `shard_mb` is in 10^6 bytes; `workers` processes (default: one a core)."""

    format: str = "folder"
    encoding: Encoding = field(default_factory=Encoding)
    shard_mb: int = 256
    workers: int | None = None
    skip_bad: bool = False  # images that cannot be decoded are left out and listed; False: that is an error at the end

    def check(self) -> None:
        """DataError for what cannot be meant."""
        if self.format not in FORMATS:
            raise DataError(f"--format {self.format} is not known: use {' or '.join(FORMATS)}")
        for flag, value in (("--shard-mb", self.shard_mb), ("--workers", self.workers)):
            if value is not None and value < 1:
                raise DataError(f"{flag} {value} is too small: give at least 1")
        self.encoding.check()


@dataclass(frozen=True)
class Prepared:
    """What was done. `report` is the part `prepare` of report.json; `already`: it was all done before."""

    destination: Path
    report: dict[str, Any]
    already: bool

    @property
    def text(self) -> str:
        """For the console: a table of counts, then what was put right, left out or is worth knowing."""
        return summary(self.destination, self.report, self.already)


class Job(NamedTuple):
    """A unit for a worker. `home`: where to write the images; None: hand them back."""

    unit: Unit
    encoding: Encoding
    classes: tuple[str, ...]
    home: Path | None


class Outcome(NamedTuple):
    """A unit that is done: (label, bytes) of each image, the images where they go into shards, what was remarkable."""

    unit: Unit
    written: list[tuple[int, int]]
    items: list[Item]
    put_right: list[str]
    undecodable: list[tuple[int, str]]


def prepare(
    source: str | Path, destination: str | Path, options: Options | None = None, *, progress: Progress | None = None
) -> Prepared:
    """Make the data set `destination` out of `source`, or go on with it, or find it done.

    Writes {train,val}/CLASS/NAME, or {train,val}-NNNNNN.tar and {train,val}.index.json (of each shard its images, bytes
    and sha256), and class_index.json (label: [class, words]) and report.json. Raises DataError in one line for what is
    wrong with source, destination or options, for a full disk, and at the end for counts that are not as expected (the
    images are there then, and the report says which); RunError where a worker died.
    """
    options = options or Options()
    options.check()
    root, home = (Path(os.path.abspath(Path(path).expanduser())) for path in (source, destination))
    found = recognise(root)
    request = _request(found, options)
    check_place(root, home)
    finished = finished_report(home, request)
    if finished is None:
        with locked(home):
            state = _begin(home, request, found, options)
            try:
                _fill(home, found, options, state, progress)
            except BrokenProcessPool:
                remedy = "run the same command again, perhaps with fewer --workers; it goes on from here"
                raise RunError(f"a worker process was killed, most often for want of memory: {remedy}") from None
            report = _end(home, found, options, state, progress)
    shutil.rmtree(home / ASIDE, ignore_errors=True)
    done = Prepared(home, report if finished is None else finished, finished is not None)
    if problems := [*done.report["problems"], *([] if options.skip_bad else done.report["undecodable"])]:
        more = f" ({len(problems) - 1} more, see {home / record.NAME})" if len(problems) > 1 else ""
        remedy = "prepare a corrected source into another destination, or accept undecodable files with --skip-bad"
        raise DataError(f"{home} is written but not as expected: {problems[0]}{more}; {remedy}")
    return done


def _request(source: Source, options: Options) -> dict[str, Any]:
    """What decides the result: equal requests write equal bytes."""
    digest = hashlib.sha256(repr(source.classes).encode())
    for unit in source.units:
        digest.update(repr(unit).encode(errors="surrogateescape"))
    shards = {"shard_mb": options.shard_mb} if options.format == "shards" else {}
    asked = {"format": options.format, **asdict(options.encoding), **shards}
    return {"source": str(source.root), "content": digest.hexdigest(), **asked, "version": _VERSION}


def _begin(home: Path, request: dict[str, Any], source: Source, options: Options) -> State:
    kept = home / ASIDE / "state.json"
    if kept.exists():
        state = State(**writers.read_json(kept))
        same_request(home, state.request, request)
        return state
    state = State(request)
    for split in SPLITS:
        for table in (state.images, state.bytes, state.undecodable_counts):
            table[split] = [0] * len(source.classes)
        if options.format == "shards":
            state.shards[split] = writers.kept(Shards(split, _shard_number(source, split, options)))
    writers.write_json(kept, asdict(state), home)
    return state


def _shard_number(source: Source, split: str, options: Options) -> int:
    """How many shards of about `shard_mb` the split fills, estimated from its beginning, middle and end."""
    units = [unit for unit in source.units if unit.split == split]
    seen = weight = size = 0
    for unit in units[:: max(1, len(units) // 4)]:
        with closing(_reading(unit)) as samples:
            for sample in islice(samples, 8):
                try:
                    size += len(convert(sample.name, sample.data, options.encoding).data) + 5 * 512  # two members
                except BadImage:
                    continue
                seen, weight = seen + 1, weight + unit.weigh(sample)
    scale = sum(unit.weight for unit in units) / max(1, weight)
    return max(1, min(math.ceil(size * scale / (options.shard_mb * 10**6)), int(seen * scale)))


def _reading(unit: Unit) -> Iterator[Any]:
    try:
        yield from unit.samples()
    except DataError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's are among them
        reason = " ".join(str(error).split())
        raise DataError(f"the source cannot be read ({reason}): correct that, then run again") from None


def _work(job: Job) -> Outcome:
    """Read, convert and, into a folder, write one unit; in a worker."""
    done = Outcome(job.unit, [], [], [], [])
    with closing(_reading(job.unit)) as samples:
        for sample in samples:
            place = f"{job.unit.split}/{job.classes[sample.label]}/{sample.name}"
            try:
                name, data, oddity = convert(sample.name, sample.data, job.encoding)
            except BadImage as error:
                done.undecodable.append((sample.label, f"{place} {error}"))
                continue
            if oddity:
                done.put_right.append(f"{place} {oddity}")
            done.written.append((sample.label, len(data)))
            item = Item(sample.label, name, data)
            if job.home is None:
                done.items.append(item)
            else:
                writers.write_images(job.home, job.unit.split, job.classes, [item])
    return done


def _fill(home: Path, source: Source, options: Options, state: State, progress: Progress | None) -> None:
    """Do all units that are not done yet."""
    target = home if options.format == "folder" else None
    jobs = (Job(unit, options.encoding, source.classes, target) for unit in source.units[state.done :])
    total = sum(unit.weight for unit in source.units)
    shards = {split: Shards(**kept) for split, kept in state.shards.items()}
    images = sum(map(sum, state.images.values()))
    if progress is not None and state.done < len(source.units):
        progress("preparing", state.weight, total, images)
    with closing(run_jobs(_work, jobs, options.workers)) as outcomes:
        for outcome in outcomes:
            split = outcome.unit.split
            if target is None:
                shards[split].add(home, outcome.items)
                state.shards[split] = writers.kept(shards[split])
            _take(state, outcome)
            writers.write_json(home / ASIDE / "state.json", asdict(state), home)
            images += len(outcome.written)
            if progress is not None:
                progress("preparing", state.weight, total, images)


def _take(state: State, outcome: Outcome) -> None:
    split = outcome.unit.split
    for label, size in outcome.written:
        state.images[split][label] += 1
        state.bytes[split][label] += size
    for label, _ in outcome.undecodable:
        state.undecodable_counts[split][label] += 1
    state.put_right_count += len(outcome.put_right)
    state.put_right = (state.put_right + outcome.put_right)[:_LISTED]
    state.undecodable = (state.undecodable + [text for _, text in outcome.undecodable])[:_LISTED]
    state.done += 1
    state.weight += outcome.unit.weight


def _end(home: Path, source: Source, options: Options, state: State, progress: Progress | None) -> dict[str, Any]:
    """Give shards their names or count the files, then write what tells of the set; the report last of all."""
    for split in SPLITS:
        if options.format == "folder":
            writers.check_images(home, split, source.classes, state.images[split], state.bytes[split])
            continue
        jobs = Shards(**state.shards[split]).finishing(home)
        lines, images = [], 0
        with closing(run_jobs(writers.finish, jobs, options.workers)) as finished:
            for line in finished:
                lines.append(line)
                images += int(line["samples"])
                if progress is not None:
                    progress(f"reading back {split}", len(lines), len(jobs), images)
        index = {"split": split, "classes": source.classes, "samples": images, "shards": lines}
        writers.write_json(home / f"{split}.index.json", index, home, indent=1)
    names = {label: list(entry) for label, entry in enumerate(zip(source.classes, source.words))}
    writers.write_json(home / "class_index.json", names, home, indent=1)
    report = {
        "request": state.request,
        "layout": source.layout,
        **{key: {s: dict(zip(source.classes, getattr(state, key)[s])) for s in SPLITS} for key in ("images", "bytes")},
        "put_right": state.put_right,
        "put_right_count": state.put_right_count,
        "undecodable": state.undecodable,
        "undecodable_count": sum(map(sum, state.undecodable_counts.values())),
        "notes": list(source.notes),
        "problems": count_problems(source, state.images, state.undecodable_counts),
    }
    with writers.writing(home):
        if options.format == "folder":
            os.sync()  # a report that is there tells of images that a power failure cannot take any more
        record.write(home / record.NAME, "prepare", report, home / ASIDE / "report.new")
    return report
