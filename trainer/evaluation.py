"""The evaluate command: the accuracy of trained weights, whosever they are, and where they are wrong."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer import labels, precision
from trainer.answers import Answers, Observer
from trainer.config import Config, ConfigError
from trainer.data.loader import EvaluationBatches, open_validation
from trainer.distributed import World, world
from trainer.evaluate import evaluate
from trainer.models.start import check_sizes
from trainer.target import Target, find


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How the labels are to be read, and what is to be written."""

    real: str | None = None  # ReaL's real.json
    numbered: bool = False
    subset: bool = False
    classes: str | None = None  # a class_index.json that names the network's classes
    output: str | None = None  # file for everything that was found
    table: bool = False  # print the classes and the confusions

    def __post_init__(self) -> None:
        if self.subset and (self.real or self.numbered):
            other = "--real" if self.real else "--numbered"
            raise ConfigError(f"--subset and {other} are for different sets: give one of them")
        if self.output and not Path(self.output).absolute().parent.is_dir():
            raise ConfigError(f"--output {self.output}: there is no folder {Path(self.output).parent}; make it first")


def evaluate_target(text: str, overrides: list[str], wanted: Wanted) -> int:
    """Print the accuracy of what `text` stands for (trainer.target.find) as one JSON line; returns 0."""
    target = find(text, overrides)
    with world(target.config) as here:
        precision.set_kernels(target.config, here.device)
        brief, whole = _evaluate(target, wanted, here)
        if here.is_main:
            if wanted.output:
                _write(Path(wanted.output), json.dumps(whole, indent=1) + "\n")
            if wanted.table:
                print(_table(whole))
            print(json.dumps(brief))
    return 0


def _evaluate(target: Target, wanted: Wanted, here: World) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the line says, all that was found): of the weights and, as `ema`, of their average where there is one."""
    config = target.config
    classes = labels.read_classes(wanted.classes) if wanted.classes else target.classes
    real = labels.Real(wanted.real) if wanted.real else None
    index = open_validation(config, here)
    fit = labels.fit(index, classes, numbered=wanted.numbered, subset=wanted.subset)
    index = fit.index
    batch = config.max_batch_per_gpu or max(1, min(256, config.global_batch_size // here.size))
    batches = EvaluationBatches(config, index, here, batch)

    def look(ema: bool) -> dict[str, Any]:
        model = _placed(target, len(classes or index.classes), fit, here, ema=ema)
        found, answers, seconds = _answers(config, model, batches, here)
        result = {**found, "images_per_second": round(found["count"] / seconds, 1)}
        result["calibration_error"] = round(answers.calibration_error(), 6)
        if real is not None:
            result["real_top1"], result["real_count"] = real.top1(index, answers.rows, answers.predicted)
        return result | {"per_class": answers.per_class(index.classes), "confusions": answers.confusions(index.classes)}

    raw = look(False)
    brief = {"target": target.name, **{key: value for key, value in raw.items() if not isinstance(value, list)}}
    data = config.data
    whole = {"target": target.name, "data": data.root, "size": data.crop_size, "resize": data.short_side}
    whole |= {"flip": config.loop.eval_flip, "classes": list(index.classes), **raw}
    if target.has_ema:
        averaged = look(True)
        keys = ("loss", "top1", "top5", "calibration_error", "real_top1")
        brief |= {f"ema_{key}": averaged[key] for key in keys if key in averaged}
        whole["ema"] = averaged
    return brief, whole


def _placed(target: Target, classes: int, fit: labels.Fit, here: World, *, ema: bool) -> nn.Module:
    """The network on its device."""
    config = target.config
    model = target.model(classes, ema=ema)
    check_sizes(config.model, model, {"data.eval_size": config.data.crop_size})
    if fit.columns is not None:
        model = _Restricted(model, torch.from_numpy(fit.columns))
    layout = torch.channels_last if config.precision.channels_last else torch.contiguous_format
    return model.to(here.device, memory_format=layout)


def _answers(
    config: Config, model: nn.Module, batches: EvaluationBatches, here: World
) -> tuple[dict[str, Any], Answers, float]:
    """(the averages, what was answered, seconds)."""
    observer, began = Observer(), time.monotonic()
    dtype = precision.amp_dtype(config.precision, here.device)
    found = evaluate(model, batches, here, dtype, flip=config.loop.eval_flip, observe=observer)
    assert found is not None, "nobody stops it"
    seconds = time.monotonic() - began
    return asdict(found), observer.answers(here), seconds


class _Restricted(nn.Module):
    """A network asked for some of its classes: images (n, 3, h, w) to logits (n, k)."""

    def __init__(self, model: nn.Module, columns: torch.Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("columns", columns)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)[:, self.columns]


def _table(found: dict[str, Any]) -> str:
    """The classes and the confusions as text."""
    width = max(len(row["name"]) for row in found["per_class"])
    lines = [f"{'class':<{width}}  images    top-1    top-5"]
    lines += [
        f"{row['name']:<{width}}  {row['count']:>6,}  {row['top1']:>6.2f}%  {row['top5']:>6.2f}%"
        for row in found["per_class"]
    ]
    lines += ["", "taken for one another"]
    lines += [f"{pair['count']:>6,}  {pair['actual']} for {pair['predicted']}" for pair in found["confusions"]]
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    """Replace the file as a whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text)
        os.replace(aside, path)
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written ({error.strerror}): choose another file") from error
