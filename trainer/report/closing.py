"""The end of a run's report: what bounded it and where its time went, and the table that is said last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.config import ConfigError
from trainer.report import runs
from trainer.report.breakdown import breakdown, shares
from trainer.report.console import duration
from trainer.report.health import health

Rows = list[tuple[str, str]]


def closing(folder: Path, summary: dict[str, Any]) -> tuple[dict[str, Any], Rows]:
    """(what is to be added to summary.json, the rows of the closing table), from what is in the run folder."""
    more: dict[str, Any] = {}
    rows: Rows = []
    place = (f"{summary['status']}", str(folder))
    try:
        run = runs.read(folder)
    except (ConfigError, KeyError, TypeError):  # a folder that is gone or full is not what a run fails of
        return more, [*_results(summary, None), place]
    verdict, parts = health(run), breakdown(run)
    more = {
        "health": verdict.text,
        "bound": verdict.bound,
        "seconds_by_part": {k: round(v, 3) for k, v in parts.items()},
    }
    spent = ", ".join(f"{part} {share:.1%}" for part, share in shares(parts).items() if share >= 0.0005)
    rows.append(("time", duration(summary["wall_seconds"]) + (f": {spent}" if spent else "")))
    rows.append(("health", verdict.text))
    return more, [*rows, *_results(summary, run), place]


def _results(summary: dict[str, Any], run: runs.Run | None) -> Rows:
    rows: Rows = []
    if summary.get("last_top1") is not None:
        best = [e for e in run.evaluations if e["top1"] == summary["best_top1"]] if run else []
        epoch = f" in epoch {best[0]['epoch']:.4g}" if best else ""
        rows.append(("top-1", f"{summary['last_top1']:.2f}% (best {summary['best_top1']:.2f}%{epoch})"))
    if summary.get("last_ema_top1") is not None:
        rows.append(("averaged", f"{summary['last_ema_top1']:.2f}% (best {summary['best_ema_top1']:.2f}%)"))
    if summary.get("images_per_second") is not None:
        speed = f"{summary['images_per_second']:,.0f} images/s (without warm-up, evaluation and saving)"
        rows.append(("speed", speed))
    return rows
