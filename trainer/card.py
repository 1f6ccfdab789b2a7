"""MODEL_CARD.md: what an exported network is, what it was trained on and how well it does, and how to load it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer import configfile
from trainer.config import Config, ConfigError

NAME = "MODEL_CARD.md"
_MARK = "<!-- imagenet-trainer: "
_PERSONAL = ("output_dir", "data.root", "data.stage_to", "model.weights", "report.", "checkpoint.")  # of this machine


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card tells."""

    file: str  # the export's name
    format: str
    config: Config
    classes: tuple[str, ...] | None
    source: str  # what was exported
    ema: bool
    folded: int  # BatchNorms
    check: str  # how the export was compared
    loading: list[tuple[str, tuple[str, ...]]]  # (with what, lines of Python), for FILE
    run: Path | None = None
    top1: float | None = None  # of this very checkpoint, percent
    step: int | None = None
    extra: dict[str, str] = field(default_factory=dict)


def demand_free(folder: Path, file: str) -> None:
    """ConfigError if `folder` holds the card of another file: two exports there would share one."""
    path = folder / NAME
    if path.exists() and f"{_MARK}{file} -->" not in path.read_text(errors="replace"):
        raise ConfigError(f"{path} is the card of something else than {file}: give --output FILE in another folder")


def text(facts: Facts) -> str:
    """The card, in Markdown."""
    config, data = facts.config, facts.config.data
    origin, summary = _read(facts.run, "run.json"), _read(facts.run, "summary.json")
    weights = "averaged (EMA)" if facts.ema else "raw"
    library = facts.loading[0][0] if facts.loading[0][0] in ("timm", "torchvision") else "pytorch"
    count = len(facts.classes) if facts.classes else config.model.num_classes or 1000
    lines = ["---", f"library_name: {library}", "pipeline_tag: image-classification", "---", f"{_MARK}{facts.file} -->"]
    lines += [f"# {config.model.name}, {count} classes", ""]
    lines += [f"`{facts.file}` ({facts.format}): the {weights} weights of `{facts.source}`. {facts.check}", ""]
    for who, code in facts.loading:
        lines += [f"## Load it with {who}", "", "```python", *(c.replace("FILE", facts.file) for c in code), "```", ""]
    lines += ["`images` are float32 (n, 3, height, width), RGB, normalised as below.", "", "## Images", ""]
    resize = f"short side to {data.short_side} px (bilinear, antialiased)" if data.short_side else "none"
    lines += [f"* resize: {resize}; then the central {data.crop_size} x {data.crop_size} px"]
    lines += [f"* scaled to [0, 1], mean {data.mean}, standard deviation {data.std}"]
    lines += [f"* classes: {_some(facts.classes)}", "", "## Results", ""]
    lines += _results(facts, summary)
    lines += ["", "## Recipe", "", "What differs from the defaults of trainer/config.py:", "", "```yaml"]
    lines += [*recipe(config), "```", "", "## Origin", "", *_origin(origin, data.root)]
    return "\n".join(lines) + "\n"


def recipe(config: Config) -> list[str]:
    """`key: value` of every option that differs from its default, but for what concerns one machine alone."""
    default = configfile.flat(Config())
    return [
        f"{key}: {json.dumps(value)}"
        for key, value in configfile.flat(config).items()
        if value != default.get(key) and not key.startswith(_PERSONAL)
    ]


def _results(facts: Facts, summary: dict[str, Any]) -> list[str]:
    if not summary and facts.top1 is None:
        return ["None are known here: `python -m trainer evaluate` measures them."]
    lines = []
    if facts.top1 is not None:
        lines.append(
            f"* top-1 at this checkpoint (step {facts.step}): {facts.top1:.2f}%, the better of raw and averaged"
        )
    names = {"status": "the run", "steps": "steps", "epochs": "epochs", "last_top1": "last top-1 of the raw weights, %"}
    names |= {"best_top1": "best top-1 of the raw weights, %", "last_ema_top1": "last top-1 of the averaged weights, %"}
    names |= {"wall_seconds": "seconds", "images_per_second": "images/s"}
    lines += [f"* {words}: {_round(summary[key])}" for key, words in names.items() if summary.get(key) is not None]
    return lines


def _origin(origin: dict[str, Any], root: str) -> list[str]:
    lines = [f"* data: `{Path(root).name}`"]
    if not origin:
        return [*lines, "* no run folder tells where these weights come from"]
    dirty = ", with changes that were not committed" if origin.get("dirty") else ""
    lines.append(f"* commit: {origin.get('commit') or 'not known'}{dirty}")
    lines.append(f"* begun: {origin.get('started')} on {origin.get('devices')}")
    lines.append(f"* versions: {', '.join(f'{k} {v}' for k, v in (origin.get('versions') or {}).items())}")
    return lines


def _read(run: Path | None, name: str) -> dict[str, Any]:
    try:
        return json.loads((run / name).read_text()) if run else {}
    except (OSError, ValueError):
        return {}


def _some(classes: tuple[str, ...] | None, most: int = 20) -> str:
    if not classes:
        return "their names are not known"
    more = f" and {len(classes) - most} more" if len(classes) > most else ""
    return ", ".join(classes[:most]) + more


def _round(value: Any) -> Any:
    return round(value, 2) if isinstance(value, float) else value
