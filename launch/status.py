"""Where runs stand, in one table: from SLURM and from what each run wrote down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch import state
from launch.attempt import Record, read_lines
from launch.record import Submitted
from trainer import configfile
from trainer.report.folder import RunFolder

COLUMNS = ("run", "state", "job", "nodes", "step", "epoch", "top-1", "img/s", "left", "restarts", "note")
RECENT = 20  # records of metrics.jsonl that the pace is taken from


def table(runs: list[Path]) -> str:
    """One line a run, under a heading."""
    rows = [COLUMNS, *(tuple(row(run).values()) for run in runs)]
    widths = [max(len(line[i]) for line in rows) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in rows)


def row(run: Path) -> dict[str, str]:
    """What is known of one run, in words, by column."""
    submitted = Submitted.of(run)
    found = state.of(submitted)
    record = Record(run, submitted.job)
    metrics = read_lines(run / "metrics.jsonl")
    last = {kind: next((m for m in reversed(metrics) if m["kind"] == kind), {}) for kind in ("train", "eval")}
    ends = [line for line in record.lines() if line["event"] == "end"]
    total = total_steps(run)
    step = max((m["step"] for m in metrics), default=0)
    return {
        "run": str(run),
        "state": found.name,
        "job": submitted.job,
        "nodes": found.nodes or (record.begun()[-1]["nodes"] if record.begun() and found.live else ""),
        "step": f"{step}/{total}" if total else str(step),
        "epoch": f"{metrics[-1]['epoch']:g}" if metrics else "",
        "top-1": f"{last['eval']['top1']:.2f}%" if last["eval"] else "",
        "img/s": f"{last['train']['images_per_second']:,.0f}" if last["train"].get("images_per_second") else "",
        "left": left(metrics, total) if found.name == "RUNNING" else "",
        "restarts": str(max(0, len(record.begun()) - 1)),
        "note": found.reason or (ends[-1]["reason"] if ends else ""),
    }


def total_steps(run: Path) -> int | None:
    """Steps from beginning to end, None before the run has begun."""
    folder = RunFolder(run)
    origin = folder.read("run.json")
    if not origin:
        return None
    planned = origin["plan"]["total_steps"]
    return min(planned, configfile.load(run / "config.yaml").loop.max_steps or planned)


def left(metrics: list[dict[str, Any]], total: int | None) -> str:
    """Time to the end at the recent pace, evaluation and saving included; empty where it cannot be said."""
    recent = [m for m in metrics if m["kind"] == "train"][-RECENT:]
    if total is None or len(recent) < 2 or recent[-1]["step"] <= recent[0]["step"]:
        return ""
    pace = (recent[-1]["wall_seconds"] - recent[0]["wall_seconds"]) / (recent[-1]["step"] - recent[0]["step"])
    seconds = int(pace * (total - metrics[-1]["step"]))
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
