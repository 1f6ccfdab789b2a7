"""A study as its YAML says it, and the runs that follow: every point of every axis, for every seed."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trainer import configfile
from trainer.config import Config, ConfigError
from trainer.mistakes import one_of, pair

OWN = ("seed", "output_dir", "report.name")  # options of a run that the study sets


@dataclass(frozen=True, kw_only=True)
class Plot:
    """The figure."""

    kind: str = "curves"  # curves | gradients (heat maps of what report.gradient_norms records, layer by layer)
    x: str = "step"  # step | epoch | samples | wall_seconds
    y: str = "error"  # error (100 - top1) | top1 | loss, of the lines
    thin: str = "train"  # train (with augmentation, running, as metrics.jsonl has it) | eval | none
    bold: str = "eval"  # likewise
    panels: str | None = None  # axis of which each point gets a panel of its own; None: one panel
    y_range: list[float] | None = None  # of the lines; None: what there is

    def __post_init__(self) -> None:
        one_of("plot.kind", self.kind, ("curves", "gradients"))
        one_of("plot.x", self.x, ("step", "epoch", "samples", "wall_seconds"))
        one_of("plot.y", self.y, ("error", "top1", "loss"))
        for key in ("thin", "bold"):
            one_of(f"plot.{key}", getattr(self, key), ("train", "eval", "none"))
        if self.y_range is not None:
            pair("plot.y_range", self.y_range, least=-1.0)


@dataclass(frozen=True, kw_only=True)
class Published:
    """What others report, in percent, beside which ours stand."""

    source: str = ""
    error: dict[str, Any] = field(default_factory=dict)  # of a network, by its name in the study


@dataclass(frozen=True, kw_only=True)
class Study:
    """The keys of a study's YAML."""

    config: str = ""  # the recipe that every run starts from, relative to the study's file
    output_dir: str = "runs/study"  # holds NAME/seedS of every run, table.md and figure.svg
    seeds: list[int] = field(default_factory=lambda: [0])
    set: dict[str, Any] = field(default_factory=dict)  # options of all runs: {schedule.epochs: 30}
    axes: dict[str, Any] = field(default_factory=dict)  # {AXIS: {POINT: {OPTION: VALUE}}}; several are crossed
    leave_out: list[str] = field(default_factory=list)  # names that the crossing gives and nobody wants
    plot: Plot = field(default_factory=Plot)
    published: Published = field(default_factory=Published)


@dataclass(frozen=True)
class Run:
    """One training run."""

    name: str  # its points, joined: plain-20
    points: dict[str, str]  # by axis
    seed: int
    recipe: Path
    words: list[str]  # key=value, as for `python -m trainer train RECIPE`
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    def __str__(self) -> str:
        return f"{self.name} seed {self.seed}"


def load(path: str | Path, words: list[str]) -> tuple[Study, list[Run]]:
    """The study in file `path` and its runs, seed by seed, each config checked; ConfigError names whatever is wrong.

    Args:
        words: key=value; those of the study's own keys change the study, all others go to every run.
    """
    known = [one.name for one in fields(Study)]
    study_words = [word for word in words if re.split(r"[.=]", word, maxsplit=1)[0] in known]
    study = configfile.load_as(Study, path, study_words)
    try:
        return study, _runs(study, Path(path), [word for word in words if word not in study_words])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error


def _runs(study: Study, path: Path, words: list[str]) -> list[Run]:
    if not study.config:
        raise ConfigError("config is missing: name the recipe that every run starts from, relative to this file")
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise ConfigError(f"seeds={study.seeds} must be one or more numbers, each once")
    axes = {axis: _points(axis, points) for axis, points in study.axes.items()}
    if not axes:
        raise ConfigError("axes is missing: write {AXIS: {POINT: {OPTION: VALUE}}}, for example {net: {a: {}, b: {}}}")
    if study.plot.panels is not None:
        one_of("plot.panels", study.plot.panels, tuple(axes))
    varied = {key: axis for axis, points in axes.items() for point in points.values() for key in point}
    for word in words:
        key = word.partition("=")[0]
        if key in OWN:
            raise ConfigError(f"{word}: the study gives every run its own; use seeds=[0,1] and output_dir=")
        if key in varied:
            raise ConfigError(f"{word}: {key} is what axis {varied[key]} varies; leave it out, or use --only")
    crossed = [dict(zip(axes, choice)) for choice in itertools.product(*axes.values())]
    names = ["-".join(points.values()) for points in crossed]
    if len(set(names)) < len(names):
        raise ConfigError(f"two runs are named {max(names, key=names.count)}: name the points of axes apart")
    for key, given in (("leave_out", study.leave_out), ("published.error", study.published.error)):
        for name in given:
            _demand_known(f"{key}={name}", name, names)
    kept = [pair for pair in zip(names, crossed) if pair[0] not in study.leave_out]
    if not kept:
        raise ConfigError(f"leave_out={study.leave_out} leaves no run")
    return [_run(study, path, words, name, points, seed) for seed in study.seeds for name, points in kept]


def _run(study: Study, path: Path, words: list[str], name: str, points: dict[str, str], seed: int) -> Run:
    chosen = dict(study.set)
    for axis, point in points.items():
        chosen |= _points(axis, study.axes[axis])[point]
    recipe = path.parent / study.config
    folder = Path(study.output_dir) / name / f"seed{seed}"
    all_words = [
        *map(_word, chosen.items()),
        *words,
        f"seed={seed}",
        f"output_dir={folder}",
        f"report.name={name}-seed{seed}",
    ]
    try:
        return Run(name, points, seed, recipe, all_words, configfile.load(recipe, all_words))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _points(axis: str, points: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(points, dict) or not points:
        raise ConfigError(f"axes.{axis} must be a mapping of points, {{NAME: {{OPTION: VALUE}}, ...}}")
    found = {}
    for point, options in points.items():
        if not re.fullmatch(r"[\w.+-]+", str(point)):
            raise ConfigError(f"axes.{axis}: point {point!r} names folders: use letters, digits, and . _ + -")
        if not isinstance(options, dict):
            raise ConfigError(f"axes.{axis}.{point} must be a mapping of options, {{model.name: resnet20}} or {{}}")
        if own := [key for key in options if key in OWN]:
            raise ConfigError(f"axes.{axis}.{point}: {own[0]} is set by the study, from seeds and output_dir")
        found[str(point)] = options
    return found


def select(runs: list[Run], only: list[str]) -> list[Run]:
    """The runs named in `only`, all if it is empty; ConfigError for a name that no run has."""
    for name in only:
        _demand_known(f"--only {name}", name, list(dict.fromkeys(run.name for run in runs)))
    return [run for run in runs if not only or run.name in only]


def _demand_known(what: str, name: str, names: list[str]) -> None:
    if name not in names:
        raise ConfigError(f"{what} is none of the study's runs; use {', '.join(names)}")


def _word(item: tuple[str, Any]) -> str:
    key, value = item
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"
