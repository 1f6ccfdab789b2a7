"""Images of each class: what a source should hold, and the summary for people."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from trainer.data.prepare.samples import SPLITS, Source, some

# ILSVRC2012 as published: https://image-net.org/challenges/LSVRC/2012/2012-downloads.php and the devkit's readme.
OFFICIAL = {"train": 1_281_167, "val": 50_000}
OFFICIAL_PER_CLASS = {"train": (732, 1300), "val": (50, 50)}
_SAID = 30  # lines of each kind on the console; the report has more

Counts = dict[str, list[int]]


def count_problems(source: Source, written: Counts, undecodable: Counts) -> list[str]:
    """What is not as expected, a line each, the class named; undecodable images count as there."""
    problems = []
    for split in SPLITS:
        counts = [good + bad for good, bad in zip(written[split], undecodable[split])]
        for name, count, expected in zip(source.classes, counts, source.expected.get(split, counts)):
            if count != expected:
                problems.append(f"{split}/{name} has {count:,} images instead of {expected:,}")
        if source.official:
            problems += official_problems(split, source.classes, counts)
    return problems


def official_problems(split: str, classes: tuple[str, ...], counts: list[int]) -> list[str]:
    """Where the counts of a split are not those of the full ILSVRC2012 set."""
    least, most = OFFICIAL_PER_CLASS[split]
    bounds = f"{least} to {most:,}" if least < most else f"{least}"
    problems = [
        f"{split}/{name} has {count:,} images instead of {bounds}"
        for name, count in zip(classes, counts)
        if not least <= count <= most
    ]
    if sum(counts) != OFFICIAL[split]:
        fewest = min(range(len(counts)), key=counts.__getitem__)
        problems.append(
            f"{split} has {sum(counts):,} images instead of {OFFICIAL[split]:,} "
            f"(fewest in {classes[fewest]}: {counts[fewest]:,})"
        )
    return problems


def summary(destination: Path, report: dict[str, Any], already: bool) -> str:
    """A table of the counts, then what was put right, left out or is worth knowing."""
    asked = report["request"]
    state = "is there already, whole" if already else "is ready"
    lines = [f"{destination} {state}: {asked['format']}, from {report['layout']} in {asked['source']}"]
    rows = [("split", "images", "MB", "classes", "fewest", "median", "most")]
    for split in SPLITS:
        counts = report["images"][split]
        low, high = min(counts, key=counts.get), max(counts, key=counts.get)
        size = sum(report["bytes"][split].values()) / 1e6
        middle = median(counts.values())
        row = (
            f"{sum(counts.values()):,}",
            f"{size:,.1f}",
            str(len(counts)),
            f"{counts[low]:,} ({low})",
            f"{middle:,.0f}",
        )
        rows.append((split, *row, f"{counts[high]:,} ({high})"))
        if empty := [name for name, count in counts.items() if not count]:
            lines.append(f"note: {split} has no images of {len(empty)} classes ({some(empty)})")
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines[1:1] = ["  ".join(text.rjust(width) for text, width in zip(row, widths)) for row in rows]
    lines += [f"note: {note}" for note in report["notes"]]
    for key, title in (("put_right", "put right"), ("undecodable", "left out, undecodable")):
        texts, number = report[key], report[f"{key}_count"]
        lines += [f"{title}: {text}" for text in texts[:_SAID]]
        if number > _SAID:
            lines.append(f"{title}: {number - _SAID:,} more, see report.json")
    return "\n".join(lines)
