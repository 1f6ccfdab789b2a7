"""What a run gets wrong: accuracy by class, confusions, and pictures of its mistakes."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from trainer.report.markup import Markup, percent, table, tag
from trainer.report.runs import Run

FEW = 30  # classes that are all shown; of more the worst, and how all are spread
WORST, BEST = 15, 5
SHOWN = 12  # confusions; the longer tail is of single images
PICTURE_BYTES = 200_000  # of one picture: ours have a short side of 128 pixels


def classes(run: Run) -> Markup:
    """All that evaluation.json of `run` tells; nothing where there is none."""
    found = run.accuracy
    parts = [_per_class(found), _confusions(found), _mistakes(run)]
    shown = [part for part in parts if part]
    if not shown:
        return Markup("")
    step, epoch = found.get("step"), found.get("epoch")
    when = f"As evaluated after step {step:,}, epoch {epoch:.4g}." if step and epoch else ""
    return tag("section", tag("h2", "What it gets wrong"), tag("p", when, cls="note"), *shown)


def _per_class(found: dict[str, Any]) -> Markup:
    rows = sorted(_objects(found.get("per_class"), "name", "count", "top1"), key=lambda row: row["top1"])
    if not rows:
        return Markup("")
    shown, title = rows, "Accuracy by class"
    if len(rows) > FEW:
        shown, title = rows[:WORST], f"The {WORST} hardest of {len(rows):,} classes"
    bars = [_bar(row["name"], row["top1"], f"{row['count']:,} images") for row in shown]
    parts: list[Any] = [tag("h3", title), tag("div", *bars, cls="bars")]
    if len(rows) > FEW:
        parts += [tag("h3", "All classes by accuracy"), _spread(rows)]
        easiest = [_bar(row["name"], row["top1"]) for row in rows[: -BEST - 1 : -1]]
        parts += [tag("h3", f"The {BEST} easiest"), tag("div", *easiest, cls="bars")]
    return tag("div", *parts, cls="block")


def _bar(name: str, share: float, more: str | None = None) -> Markup:
    """`share` in percent, as a bar."""
    filled = tag("span", tag("span", style=f"width:{min(max(share, 0), 100):.2f}%"), cls="bar")
    return tag(
        "div",
        tag("span", name, cls="name", title=name),
        filled,
        tag("span", percent(share, 1), cls="number", title=more),
    )


def _spread(rows: list[dict[str, Any]]) -> Markup:
    """How many classes have an accuracy of 0 to 10%, 10 to 20%, and so on."""
    counts = [0] * 10
    for row in rows:
        counts[min(9, max(0, int(row["top1"] / 10)))] += 1
    most = max(counts)
    columns = [
        tag(
            "div",
            tag("span", f"{count:,}" if count else "", cls="number"),
            tag("span", cls="column", style=f"height:{100 * count / most:.1f}px"),
            tag("span", f"{10 * tenth}–{10 * tenth + 10}%", cls="under"),
        )
        for tenth, count in enumerate(counts)
    ]
    return tag("div", *columns, cls="spread")


def _confusions(found: dict[str, Any]) -> Markup:
    rows = _objects(found.get("confusions"), "actual", "predicted", "count")[:SHOWN]
    if not rows:
        return Markup("")
    counts = {row["name"]: row["count"] for row in _objects(found.get("per_class"), "name", "count", "top1")}
    lines = []
    for row in rows:
        of = counts.get(row["actual"])
        share = percent(100 * row["count"] / of, 0) if of else ""
        lines.append([row["actual"], row["predicted"], f"{row['count']:,}", share])
    head = ["is", "is taken for", "times", "of its images"]
    return tag("div", tag("h3", "The confusions that cost most"), table(head, lines, (2, 3)), cls="block")


def _mistakes(run: Run) -> Markup:
    cards = []
    for row in _objects(run.accuracy.get("mistakes"), "file", "actual", "predicted", "probability")[:16]:
        source = picture(run.path, row.get("picture"))
        image = tag("img", src=source, alt="") if source else tag("div", "no picture", cls="missing")
        taken = tag("span", row["predicted"], tag("em", percent(100 * row["probability"], 0)), cls="predicted")
        caption = tag("figcaption", taken, tag("span", "is ", row["actual"]))
        cards.append(tag("figure", image, caption, title=row["file"]))
    if not cards:
        return Markup("")
    return tag("div", tag("h3", "Its most confident mistakes"), tag("div", *cards, cls="gallery"), cls="block")


def picture(run: Path, name: Any) -> str | None:
    """A data URI of the small JPEG file `name` in folder `run`; None for what is none, or lies elsewhere."""
    try:
        path = (run / str(name)).resolve()
        if not path.is_relative_to(run.resolve()) or path.stat().st_size > PICTURE_BYTES:
            return None
        content = path.read_bytes()
    except (OSError, ValueError):
        return None
    if not content.startswith(b"\xff\xd8\xff"):
        return None
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def _objects(found: Any, *keys: str) -> list[dict[str, Any]]:
    """The objects in a list that have `keys`; [] for whatever is no list."""
    rows = found if isinstance(found, list) else []
    return [row for row in rows if isinstance(row, dict) and set(keys) <= row.keys()]
