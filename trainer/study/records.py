"""What runs have left in their folders: whether they are finished, and their curves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.plan import Plan
from trainer.report.events import read_lines
from trainer.report.folder import RunFolder


def finished(config: Config) -> bool:
    """Whether the run of `config` has been trained to the end of what it asks for, read in milliseconds."""
    folder = RunFolder(config.output_dir)
    summary, origin = folder.read("summary.json"), folder.read("run.json")
    if not summary or not origin or summary["status"] != "done":
        return False
    target = config.loop.stop_at.get("top1")
    reached = max(summary.get("best_top1") or 0, summary.get("best_ema_top1") or 0)
    total = Plan.of(config, 1, origin["plan"]["samples"]).total_steps
    enough = min(total, config.loop.max_steps or total)
    return summary["steps"] >= enough or (target is not None and reached >= target)


def status(config: Config) -> str:
    """In words: done, stopped at step N, failed at step N, begun, not begun."""
    if finished(config):
        return "done"
    summary = RunFolder(config.output_dir).read("summary.json")
    records = read_lines(Path(config.output_dir) / "metrics.jsonl")
    at = f" at step {records[-1]['step']}" if records else ""
    if summary:
        # A run that was trained to the end of less than is asked for now is as good as stopped there.
        return {"done": "stopped"}.get(summary["status"], summary["status"]) + at
    return f"begun, now{at}" if at else "not begun"


@dataclass(frozen=True)
class Curve:
    """A figure along a run, averaged over seeds."""

    x: list[float]
    y: list[float]


def curve(folders: list[Path], kind: str, x: str, y: str) -> Curve:
    """Records of `kind` (train | eval) of the runs in `folders`, averaged step by step over those that have the step.

    `y` is loss, top1, or error: 100 - top1, in percent.
    """
    at: dict[int, list[tuple[float, float]]] = {}
    for folder in folders:
        for record in read_lines(folder / "metrics.jsonl"):
            if record["kind"] == kind:
                at.setdefault(record["step"], []).append((record[x], value(record, y)))
    steps = sorted(at)
    return Curve([_mean([a for a, _ in at[s]]) for s in steps], [_mean([b for _, b in at[s]]) for s in steps])


def value(record: dict[str, Any], y: str) -> float:
    return 100 - record["top1"] if y == "error" else record[y]


def last(folder: Path, kind: str, y: str) -> float | None:
    """The newest value of a run, None where there is none."""
    found = [record for record in read_lines(folder / "metrics.jsonl") if record["kind"] == kind]
    return value(found[-1], y) if found else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
