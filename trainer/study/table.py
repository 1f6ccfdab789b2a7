"""The table of a study: mean and standard deviation over seeds, beside what others published."""

from __future__ import annotations

import statistics
from pathlib import Path

from trainer.study.grid import Run, Study
from trainer.study.records import finished, last, status

NOTES = (
    "Mean over the finished seeds, ± their standard deviation where there are two or more. Test error is the last",
    "evaluation's; training error is 100 - top-1 of the last record: with augmentation, while the weights change.",
    "Steps are those that the training reached.",
)
HEAD = ("run", "seeds", "steps", "training error, %", "test error, %", "published, %")


def table(study: Study, runs: list[Run]) -> str:
    """The table in Markdown, of the finished runs; what is not finished is listed below it."""
    names = list(dict.fromkeys(run.name for run in runs))
    done = [run for run in runs if finished(run.config)]
    cells = [HEAD]
    for name in names:
        wanted = sum(run.name == name for run in runs)
        cells.append(_row(name, wanted, [run.folder for run in done if run.name == name], study))
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEAD))]
    text = [_line([cell.ljust(width) for cell, width in zip(row, widths)]) for row in cells]
    text.insert(1, _line(["-" * width for width in widths]))
    text += ["", *NOTES]
    if study.published.source:
        text += [f"Published: {study.published.source}"]
    waiting = [f"{run}: {status(run.config)}" for run in runs if run not in done]
    if waiting:
        text += ["", "Not finished: " + "; ".join(waiting) + "."]
    return "\n".join(text) + "\n"


def _row(name: str, wanted: int, folders: list[Path], study: Study) -> tuple[str, ...]:
    steps = sorted({int(step) for folder in folders if (step := last(folder, "train", "step")) is not None})
    reached = " to ".join(f"{step:,}" for step in dict.fromkeys(steps[:1] + steps[-1:]))
    errors = [_spread([e for f in folders if (e := last(f, kind, "error")) is not None]) for kind in ("train", "eval")]
    return name, f"{len(folders)} of {wanted}", reached, *errors, str(study.published.error.get(name, ""))


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
