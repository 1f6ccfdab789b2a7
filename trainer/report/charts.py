"""Line charts as inline SVG that fills whatever width it gets: only lines are stretched, the words around are HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trainer.report.markup import Markup, join, tag

SIDE = 1000  # of the square that lines are drawn in, before it is stretched
POINTS = 400  # of a line, about as many as a screen can show
DOTS = 40  # points of a line that are shown as such
COLOURS = 6  # of page.css, told apart by the colour-blind; a seventh run takes the first again
Point = tuple[float, float]
Mark = tuple[float, str, int]  # a vertical line: where, words for it, colour


@dataclass(frozen=True)
class Series:
    """A line. `style`: line | thin (many noisy points) | dashed | dots (a line with a dot at each point)."""

    name: str
    colour: int
    points: Sequence[Point]
    style: str = "line"
    run: str = ""


@dataclass(frozen=True)
class Axis:
    """How the values of an axis are written, and which are marked."""

    label: str
    write: Callable[[float], str]
    ticks: Callable[[float, float], list[float]] = field(default=lambda low, high: ticks(low, high))


def chart(series: list[Series], x: Axis, y: Axis, *, zero: bool = False, marks: Sequence[Mark] = ()) -> Markup:
    """The lines of `series` in one plot; `zero`: the y axis begins at 0."""
    drawn = [(one, thinned([p for p in one.points if all(map(math.isfinite, p))])) for one in series]
    everything = [point for _, points in drawn for point in points]
    if not everything:
        return tag("p", "Nothing to draw yet.", cls="empty")
    across = _range([p[0] for p in everything], zero=True)
    up = _range([p[1] for p in everything], zero=zero)
    up_ticks = y.ticks(*up)
    up = (min(up[0], up_ticks[0]), max(up[1], up_ticks[-1]))

    def place(value: float, low: float, high: float) -> float:
        return (value - low) / (high - low) * SIDE

    lines = [_grid(SIDE - place(value, *up)) for value in up_ticks]
    lines += [_mark(place(at, *across), words, hue) for at, words, hue in marks if across[0] <= at <= across[1]]
    for one, points in drawn:
        path = [(place(px, *across), SIDE - place(py, *up)) for px, py in points]
        lines += _line(one, path, [(x.write(px), y.write(py)) for px, py in points])
    box = tag("svg", *lines, viewBox=f"0 0 {SIDE} {SIDE}", preserveAspectRatio="none", aria_hidden="true")
    shown = [tag("i", y.write(v), style=f"bottom:{place(v, *up) / SIDE:.2%}") for v in up_ticks]
    below = [tag("i", x.write(v), style=f"left:{place(v, *across) / SIDE:.2%}") for v in x.ticks(*across)]
    plot = tag("div", box, cls="plot")
    return tag("div", tag("div", *shown, cls="y"), plot, tag("div", *below, cls="x"), tag("b", x.label), cls="chart")


def _grid(y: float) -> Markup:
    return tag("path", d=f"M0 {y:.2f}H{SIDE}", cls="grid")


def _mark(x: float, words: str, colour: int) -> Markup:
    return tag("path", tag("title", words), d=f"M{x:.2f} 0V{SIDE}", cls=f"mark c{colour % COLOURS}")


def _line(one: Series, path: list[Point], words: list[tuple[str, str]]) -> list[Markup]:
    points = [f"{x:.2f} {y:.2f}" for x, y in path]
    colour = f"c{one.colour % COLOURS}"
    told = ";".join(f"{x}|{y}" for x, y in words)
    found = [tag("path", d="M" + "L".join(points), cls=f"{one.style} {colour}", data_name=one.name, data_told=told)]
    if (one.style == "dots" and len(points) <= DOTS) or len(points) == 1:
        # A line of no length with round ends stays round however the box is stretched.
        found.append(tag("path", d="".join(f"M{point}h0" for point in points), cls=f"dot {colour}"))
    return found


def thinned(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """At most `most` points: each the mean of as many neighbours, the last as it is."""
    if len(points) <= most:
        return list(points)
    size = math.ceil((len(points) - 1) / (most - 1))
    groups = [points[i : min(i + size, len(points) - 1)] for i in range(0, len(points) - 1, size)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return [*means, points[-1]]


def _range(values: list[float], *, zero: bool = False) -> tuple[float, float]:
    low, high = min(values), max(values)
    low = min(low, 0.0) if zero else low
    if high - low < 1e-12 * max(abs(high), 1e-12):
        pad = abs(high) / 2 or 1.0
        return (low if zero and low == 0 else low - pad), high + pad
    return low, high


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round values from at or below `low` to at or above `high`, 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def inner_ticks(low: float, high: float) -> list[float]:
    """As `ticks`, without those outside."""
    return [value for value in ticks(low, high, 5) if low <= value <= high * (1 + 1e-9)]


def time_ticks(low: float, high: float) -> list[float]:
    """Round lengths of time within the range, in seconds."""
    steps = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 10800, 21600, 43200]
    step = next((s for s in steps if (high - low) / s <= 6), None) or 86400 * math.ceil((high - low) / 86400 / 6)
    return [float(v) for v in range(math.ceil(low / step) * step, int(high) + 1, step)]


def legend(entries: list[tuple[str, int | None, str]]) -> Markup:
    """(name, colour, style) of lines; None: the colour of the words."""
    items = []
    for name, colour, style in entries:
        hue = "" if colour is None else f" c{colour % COLOURS}"
        items.append(tag("li", tag("span", cls=f"key {style}{hue}"), name))
    return tag("ul", join(items), cls="legend")
