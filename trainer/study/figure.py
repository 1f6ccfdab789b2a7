"""The figure of a study: curves as in the ResNet paper's Figure 6, or heat maps of gradient norms."""

from __future__ import annotations

import math
from pathlib import Path

from trainer.report.events import read_lines
from trainer.study import svg
from trainer.study.grid import Run, Study
from trainer.study.records import Curve, curve

WIDTH, HEIGHT, GAP = 380, 300, 64  # of a panel, and from one to the next
LEFT, TOP, BOTTOM = 64, 64, 52
ACROSS = 3  # panels in a row
COLUMNS = 64  # of a heat map
WORDS = {
    "train": "training {} (with augmentation, running mean)",
    "eval": "test {}",
    "error": "error (%)",
    "top1": "top-1 (%)",
    "loss": "loss",
    "step": "step",
    "epoch": "epoch",
    "samples": "samples",
    "wall_seconds": "seconds",
}


def draw(study: Study, runs: list[Run]) -> str:
    """The figure as SVG, of what the run folders hold now."""
    return _heat_maps(study, runs) if study.plot.kind == "gradients" else _curves(study, runs)


def _curves(study: Study, runs: list[Run]) -> str:
    plot = study.plot
    shown = [(kind, width) for kind, width in ((plot.thin, 1.0), (plot.bold, 2.4)) if kind != "none"]
    # By panel, then by the name of its line, then thin and bold.
    panels: dict[str, dict[str, list[tuple[Curve, float]]]] = {}
    for run in runs:
        panel = run.points[plot.panels] if plot.panels else ""
        label = "-".join(p for axis, p in run.points.items() if axis != plot.panels) if len(run.points) > 1 else ""
        folders = [other.folder for other in runs if other.name == run.name]
        drawn = [(curve(folders, kind, plot.x, plot.y), width) for kind, width in shown]
        panels.setdefault(panel, {})[label or run.name] = drawn
    curves = [c for lines_ in panels.values() for pair in lines_.values() for c, _ in pair if c.x]
    x = (0.0, max((max(c.x) for c in curves), default=1.0))
    ys = [value for c in curves for value in c.y if math.isfinite(value)] or [0.0, 1.0]
    y = (plot.y_range[0], plot.y_range[1]) if plot.y_range else _padded(min(ys), max(ys))
    labels = list(dict.fromkeys(label for lines_ in panels.values() for label in lines_))
    marks = [svg.text(LEFT, 22, _legend(study, shown), size=12)]
    for number, (title, drawn) in enumerate(panels.items()):
        panel = _place(number, x, y)
        marks += svg.frame(panel, title, WORDS[plot.x], WORDS[plot.y])
        inside = []
        for label, pairs in drawn.items():
            colour = svg.COLOURS[labels.index(label) % len(svg.COLOURS)]
            inside += [svg.line([panel.at(*p) for p in zip(c.x, c.y)], colour, w) for c, w in pairs if c.x]
        marks += svg.clip(panel, f"panel{number}", inside)
        for row, label in enumerate(drawn):
            colour = svg.COLOURS[labels.index(label) % len(svg.COLOURS)]
            right, down = panel.left + WIDTH - 10, panel.top + 18 + 16 * row
            marks += [svg.text(right, down, label, anchor="end", fill=colour, font_weight="bold")]
    return svg.page(*_size(len(panels)), marks)


def _legend(study: Study, shown: list[tuple[str, float]]) -> str:
    noun = WORDS[study.plot.y].partition(" ")[0]
    seeds = f"; mean of {len(study.seeds)} seeds" if len(study.seeds) > 1 else ""
    return "; ".join(f"{'bold' if w > 1 else 'thin'}: {WORDS[k].format(noun)}" for k, w in shown) + seeds


def _heat_maps(study: Study, runs: list[Run]) -> str:
    plot = study.plot
    maps = {run.name: _gradients([r.folder for r in runs if r.name == run.name], plot.x) for run in runs}
    values = [v for rows, _ in maps.values() for row in rows.values() for v in row if v is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    words = "norm of each layer's gradient, by layer (first on top) and time; one colour scale, from "
    marks = [svg.text(LEFT, 22, f"{words}{10**low:.2g} to {10**high:.2g} (logarithmic)")]
    width, _ = _size(len(maps))
    for place in range(100):
        marks += [f"<rect x='{width - 170 + place:g}' y='12' width='1.5' height='12' fill='{svg.colour(place / 99)}'/>"]
    for number, (name, (rows, end)) in enumerate(maps.items()):
        panel = _place(number, (0.0, end), (len(rows) or 1, 0.0))
        marks += svg.frame(panel, f"{name} ({len(rows)} layers)", WORDS[plot.x], "layer")
        if rows:
            marks += svg.heat(panel, list(rows.values()), lambda v: (v - low) / ((high - low) or 1))
    return svg.page(*_size(len(maps)), marks)


def _gradients(folders: list[Path], x: str) -> tuple[dict[str, list[float | None]], float]:
    """log10 of the gradient norms by layer, in COLUMNS columns of equal time, averaged; and where time ends."""
    records = [record for folder in folders for record in read_lines(folder / "gradients.jsonl")]
    end = max((record[x] for record in records), default=0.0)
    sums: dict[str, list[list[float]]] = {}
    for record in records:
        column = min(int(record[x] / (end or 1) * COLUMNS), COLUMNS - 1)
        for layer, norm in record["norms"].items():
            if norm and _is_layer(layer):
                sums.setdefault(layer, [[] for _ in range(COLUMNS)])[column].append(math.log10(norm))
    return {k: _filled([sum(c) / len(c) if c else None for c in row]) for k, row in sums.items()}, end


def _is_layer(parameter: str) -> bool:
    """Whether it is the weight of a convolution or of the head; those of norms and shortcuts are left out."""
    return parameter.endswith(".weight") and not any(word in parameter for word in ("bn", "norm", "downsample"))


def _filled(row: list[float | None]) -> list[float | None]:
    """Columns that no record falls into show the one before: records are log_every steps apart."""
    found: list[float | None] = []
    for value in row:
        found.append(value if value is not None or not found else found[-1])
    first = next((v for v in found if v is not None), None)
    return [first if v is None else v for v in found]


def _place(number: int, x: tuple[float, float], y: tuple[float, float]) -> svg.Panel:
    row, column = divmod(number, ACROSS)
    return svg.Panel(LEFT + column * (WIDTH + GAP), TOP + row * (HEIGHT + TOP + BOTTOM), WIDTH, HEIGHT, x, y)


def _size(panels: int) -> tuple[float, float]:
    rows = -(-panels // ACROSS)
    across = min(panels, ACROSS)
    return LEFT + across * (WIDTH + GAP) - GAP + 24, rows * (HEIGHT + TOP + BOTTOM)


def _padded(low: float, high: float) -> tuple[float, float]:
    more = 0.05 * ((high - low) or 1.0)
    return max(0.0, low - more), high + more
