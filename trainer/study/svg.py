"""A few marks of SVG: enough for a panel of curves and a heat map, and no more. Lengths are in pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from xml.sax.saxutils import escape

FONT = "font-family='Helvetica, Arial, sans-serif'"
GREY = "#999999"
# Okabe and Ito's colours, which the colour-blind tell apart (jfly.uni-koeln.de/color).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8AE1C")
# Five points of matplotlib's viridis, from low to high.
_RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


@dataclass(frozen=True)
class Panel:
    """A rectangle of the page, and the range of the data that it shows."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the data lies on the page."""
        right = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return self.left + right * self.width, self.top + (1 - up) * self.height


def page(width: float, height: float, marks: list[str]) -> str:
    """The marks as a file."""
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:g} {height:g}' width='{width:g}' {FONT}>"
    return "\n".join([head, f"<rect width='{width:g}' height='{height:g}' fill='white'/>", *marks, "</svg>", ""])


def text(x: float, y: float, words: str, *, size: float = 12, anchor: str = "start", **more: str) -> str:
    """Words whose base line is at y. `more` are attributes, such as fill or font_weight."""
    attributes = "".join(f" {key.replace('_', '-')}='{value}'" for key, value in more.items())
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size:g}' text-anchor='{anchor}'{attributes}>{escape(words)}</text>"
    )


def upright(x: float, y: float, words: str) -> str:
    """Words that read from bottom to top, centred at (x, y)."""
    return text(x, y, words, anchor="middle", transform=f"rotate(-90 {x:.1f} {y:.1f})")


def line(points: list[tuple[float, float]], colour: str, width: float) -> str:
    """A line through points of the page; a dot where there is one."""
    if len(points) == 1:
        return f"<circle cx='{points[0][0]:.1f}' cy='{points[0][1]:.1f}' r='{1.5 * width:g}' fill='{colour}'/>"
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='{width:g}' stroke-linejoin='round'/>"


def frame(panel: Panel, title: str, x: str, y: str) -> list[str]:
    """A panel's border, ticks, grid and words; y empty: no ticks and no name on that side."""
    right, bottom = panel.left + panel.width, panel.top + panel.height
    marks = [text(panel.left + panel.width / 2, panel.top - 8, title, size=13, anchor="middle", font_weight="bold")]
    for tick in ticks(*panel.x):
        across, _ = panel.at(tick, panel.y[0])
        marks += [line([(across, bottom), (across, bottom + 4)], GREY, 1)]
        marks += [text(across, bottom + 17, _number(tick), size=11, anchor="middle")]
    if y:
        for tick in ticks(*panel.y):
            _, down = panel.at(panel.x[0], tick)
            marks += [line([(panel.left, down), (right, down)], "#e5e5e5", 1)]
            marks += [text(panel.left - 6, down + 4, _number(tick), size=11, anchor="end")]
        marks += [upright(panel.left - 36, panel.top + panel.height / 2, y)]
    marks += [text(panel.left + panel.width / 2, bottom + 34, x, anchor="middle")]
    box = f"x='{panel.left:g}' y='{panel.top:g}' width='{panel.width:g}' height='{panel.height:g}'"
    return [*marks, f"<rect {box} fill='none' stroke='{GREY}'/>"]


def clip(panel: Panel, name: str, marks: list[str]) -> list[str]:
    """The marks, cut at the panel's border."""
    box = f"x='{panel.left:g}' y='{panel.top:g}' width='{panel.width:g}' height='{panel.height:g}'"
    return [f"<clipPath id='{name}'><rect {box}/></clipPath>", f"<g clip-path='url(#{name})'>", *marks, "</g>"]


def heat(panel: Panel, rows: list[list[float | None]], level: Callable[[float], float], levels: int = 32) -> list[str]:
    """Cells that fill the panel, rows[0] at the top; `level` maps a value to [0, 1], None stays white.

    One path a colour: a few bytes a cell.
    """
    paths: dict[int, list[str]] = {}
    high, wide = panel.height / len(rows), panel.width / max(map(len, rows))
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if value is not None:
                step = round(min(max(level(value), 0.0), 1.0) * (levels - 1))
                corner = f"M{panel.left + j * wide:.1f} {panel.top + i * high:.1f}"
                paths.setdefault(step, []).append(f"{corner}h{wide + 0.3:.1f}v{high + 0.3:.1f}h-{wide + 0.3:.1f}z")
    return [f"<path d='{''.join(cells)}' fill='{colour(s / (levels - 1))}'/>" for s, cells in sorted(paths.items())]


def colour(share: float) -> str:
    """The colour at `share` of the way from low to high."""
    place = share * (len(_RAMP) - 1)
    low = min(int(place), len(_RAMP) - 2)
    mixed = [round(a + (b - a) * (place - low)) for a, b in zip(_RAMP[low], _RAMP[low + 1])]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from the lower to the higher end, about so many."""
    low, high = min(low, high), max(low, high)
    span = (high - low) or 1.0
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.6g}"
