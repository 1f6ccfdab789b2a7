"""The curves of a report: accuracy, loss, learning rate and speed, each by epoch, by samples and by wall time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trainer.report import charts
from trainer.report.charts import Axis, Series
from trainer.report.markup import Markup, join, span, tag
from trainer.report.runs import Run

PERCENT = Axis("", lambda v: f"{v:.4g}%")
PLAIN = Axis("", lambda v: f"{v:.4g}")
SPEED = Axis("", lambda v: f"{v:,.4g}" if v < 1000 else f"{v:,.0f}")


def _count(value: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


_Wanted = tuple[Run, Series, str, str]  # (the run, a line without its points, train or eval, the key of a record)

# What may stand below a chart: the key of a record, and how it is written.
ACROSS = {
    "epoch": Axis("epoch", lambda v: f"{v:.4g}", charts.inner_ticks),
    "samples": Axis("samples", _count, charts.inner_ticks),
    "wall_seconds": Axis("wall time", lambda v: span(round(v)), charts.time_ticks),
}
NAMES = {"epoch": "Epochs", "samples": "Samples", "wall_seconds": "Wall time"}


def switches() -> Markup:
    """The choice of the axis below all charts; page.css shows the one that is chosen."""
    inputs = [
        tag("input", type="radio", name="across", id=f"across-{key}", checked="" if key == "epoch" else None)
        for key in ACROSS
    ]
    labels = [tag("label", NAMES[key], **{"for": f"across-{key}"}) for key in ACROSS]
    return join([*inputs, tag("div", *labels, cls="switch", role="group", aria_label="axis below the charts")])


def curves(runs: list[Run]) -> Markup:
    several = len(runs) > 1
    accuracy, loss, rate, speed = [], [], [], []
    for colour, run in enumerate(runs):
        name = f"{run.name} " if several else ""
        ema = any("ema_top1" in record for record in run.evaluations)
        accuracy.append((run, Series(f"{name}training", colour, [], "thin", run.name), "train", "top1"))
        loss.append((run, Series(f"{name}training", colour, [], "thin", run.name), "train", "loss"))
        if ema:
            accuracy.append(
                (run, Series(f"{name}averaged weights", colour, [], "dashed", run.name), "eval", "ema_top1")
            )
            loss.append((run, Series(f"{name}averaged weights", colour, [], "dashed", run.name), "eval", "ema_loss"))
        accuracy.append((run, Series(f"{name}evaluation", colour, [], "dots", run.name), "eval", "top1"))
        loss.append((run, Series(f"{name}evaluation", colour, [], "dots", run.name), "eval", "loss"))
        rate.append((run, Series(run.name, colour, [], run=run.name), "train", "lr"))
        speed.append((run, Series(run.name, colour, [], run=run.name), "train", "images_per_second"))
    return tag(
        "div",
        _figure("Top-1 accuracy", accuracy, PERCENT),
        _figure("Loss", loss, PLAIN),
        _figure("Learning rate", rate, PLAIN, zero=True),
        _figure("Images per second", speed, SPEED, zero=True, restarts=runs),
        cls="curves",
    )


def _figure(title: str, wanted: list[_Wanted], y: Axis, *, zero: bool = False, restarts: Sequence[Run] = ()) -> Markup:
    """One chart on each axis, with dotted lines where the runs `restarts` were started again."""
    panels, used, marks = [], [], []
    for key, x in ACROSS.items():
        series = [replace(one, points=_points(run, kind, key, value)) for run, one, kind, value in wanted]
        used = [one for one in series if one.points]
        marks = [(*mark, colour) for colour, run in enumerate(restarts) for mark in _restarts(run, key)]
        drawn = charts.chart(used, x, y, zero=zero, marks=marks)
        panels.append(tag("div", drawn, cls=f"by-{key}"))
    entries = charts.legend(_entries(used)) if len(used) > 1 else ""
    note = "dotted: started again" if marks else ""
    heading = tag("figcaption", tag("h3", title), tag("span", note) if note else "", entries)
    return tag("figure", heading, *panels)


def _entries(used: list[Series]) -> list[tuple[str, int | None, str]]:
    """What the lines are: of one run each by name, of several the runs by colour and the kinds by style."""
    runs = {one.colour: one.run for one in used}
    if len(runs) == 1:
        return [(one.name, one.colour, one.style) for one in used]
    kinds = {one.style: one.name.removeprefix(f"{one.run} ") for one in used}
    named = [(name, None, style) for style, name in kinds.items()] if len(kinds) > 1 else []
    return [*((name, colour, "line") for colour, name in runs.items()), *named]


def _points(run: Run, kind: str, across: str, value: str) -> list[tuple[float, float]]:
    records = run.train if kind == "train" else run.evaluations
    return [(record[across], record[value]) for record in records if isinstance(record.get(value), (int, float))]


def _restarts(run: Run, across: str) -> list[tuple[float, str]]:
    """Where, on that axis, the run was started again, and words for it."""
    again = [event for event in run.events if event["kind"] == "start" and event.get("attempt", 1) > 1]
    return [(_at(run, e, across), f"started again at step {e['step']} (attempt {e['attempt']})") for e in again]


def _at(run: Run, event: dict[str, Any], across: str) -> float:
    if across in ("wall_seconds", "step"):
        return event[across]
    samples = event["step"] * run.plan.get("global_batch", 0)
    return samples if across == "samples" else samples / max(1, run.plan.get("samples", 1))
