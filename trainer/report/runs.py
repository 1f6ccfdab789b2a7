"""A run folder as it is read for a report: by anyone, at any time, whole or not. Nothing here imports torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from trainer.config import ConfigError
from trainer.report import events

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run folder holds so far; what is missing is empty."""

    path: Path
    config: dict[str, Any]  # dotted key to value
    origin: Record  # run.json
    train: list[Record]
    evaluations: list[Record]
    events: list[Record]
    accuracy: Record  # evaluation.json: per class, confusions, mistakes
    summary: Record

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def plan(self) -> Record:
        return self.origin.get("plan") or {}

    @property
    def status(self) -> str:
        """done | stopped | failed | running; running may also be a run that was killed."""
        ends = [event for event in self.events if event["kind"] in ("start", "end")]
        if ends and ends[-1]["kind"] == "start":
            return "running"
        return str(self.summary.get("status", "running"))

    @property
    def wall_seconds(self) -> float:
        return max((float(record.get("wall_seconds") or 0) for record in self._last), default=0.0)

    @property
    def images_per_second(self) -> float | None:
        """Of the whole run; while it is under way, of the steps told so far."""
        if self.status != "running" and self.summary.get("images_per_second"):
            return self.summary["images_per_second"]
        told = [record for record in stretches(self.train) if record[1]]
        seconds = sum(steps * seconds for steps, seconds, _ in told)
        return self.plan.get("global_batch", 0) * sum(steps for steps, _, _ in told) / seconds if seconds else None

    @property
    def best(self) -> Record | None:
        """The evaluation with the best top-1 there is, of the averaged weights too, as `top1` and `epoch`."""
        scored = [(top1(record), record) for record in self.evaluations]
        if not scored:
            return None
        accuracy, record = max(scored, key=lambda pair: pair[0])
        return {"top1": accuracy, "epoch": record["epoch"], "step": record["step"]}

    @property
    def _last(self) -> list[Record]:
        return [*self.train[-1:], *self.evaluations[-1:], *self.events[-1:], self.summary]


def top1(record: Record) -> float:
    """Of an evaluation: the better of the weights' and their average's, in percent."""
    return max(record["top1"], record.get("ema_top1") or 0.0)


def stretches(train: list[Record]) -> list[tuple[int, float, Record]]:
    """(steps, seconds of one, record) of each record: the steps since the one before; 0.0 seconds where not timed."""
    found, before = [], 0
    for record in train:
        found.append((max(0, record["step"] - before), record.get("step_seconds") or 0.0, record))
        before = record["step"]
    return found


def read(path: str | Path) -> Run:
    """The run in folder `path`; ConfigError where there is none."""
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is not a run folder (it has no config.yaml): give the output_dir of a run")
    needed = {"kind", "step", "epoch", "samples", "loss", "top1", "wall_seconds"}
    metrics = [line for line in events.read_lines(folder / "metrics.jsonl") if needed <= line.keys()]
    try:
        config = _flat(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
    except Exception as error:  # omegaconf's and yaml's errors are many
        raise ConfigError(f"{folder / 'config.yaml'} is not readable: {error}; restore it") from error
    return Run(
        path=folder,
        config=config,
        origin=_object(folder / "run.json"),
        train=[record for record in metrics if record["kind"] == "train"],
        evaluations=[record for record in metrics if record["kind"] == "eval"],
        events=events.read(folder),
        accuracy=_object(folder / "evaluation.json"),
        summary=_object(folder / "summary.json"),
    )


def _object(path: Path) -> Record:
    """The JSON object in a file, {} where there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _flat(section: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items() if isinstance(section, dict) else ():
        # A dictionary that is a value, as loop.stop_at is, has no section's name.
        inner = isinstance(value, dict) and not prefix
        flat |= _flat(value, f"{key}.") if inner else {f"{prefix}{key}": value}
    return flat
