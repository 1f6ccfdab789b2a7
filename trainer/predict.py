"""The predict command: the most likely classes of images, decoded and cut as evaluation decodes and cuts them."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer import labels, precision
from trainer.config import Config, ConfigError
from trainer.data.index import IMAGE_SUFFIXES
from trainer.data.jpeg import measure_all
from trainer.data.loader import EvaluationBatches
from trainer.data.table import DataError, Index, assemble
from trainer.distributed import World, world
from trainer.models.start import check_sizes
from trainer.picture_grid import draw_grid
from trainer.precision import autocast
from trainer.target import Target, find

_BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """The k most likely classes of one image, the likeliest first."""

    file: str
    names: list[str]
    words: list[str]  # what to call them
    probabilities: list[float]  # 0 to 1

    def record(self) -> dict[str, Any]:
        top = zip(self.names, self.words, self.probabilities)
        return {"file": self.file, "top": [{"class": n, "name": w, "probability": round(p, 6)} for n, w, p in top]}


def predict(text: str, arguments: list[str], *, top: int, ema: bool, how: str, grid: str | None) -> int:
    """Print the classes of images as a table or JSON lines, in the order they were named; 0.

    Nothing is printed before the last image is done: ConfigError names every file that is no image.

    Args:
        text: see trainer.target.find.
        arguments: files, folders, globs; what holds "=" and is no file is an override of the config.
        how: "table" or "json".
        grid: a picture file to draw the images and their classes into.
    """
    overrides = [text for text in arguments if "=" in text and not os.path.exists(text)]
    if top < 1:
        raise ConfigError(f"--top {top} is too small: give at least 1")
    files = find_images([text for text in arguments if text not in overrides])
    target = find(text, overrides)
    if target.config.data.source == "synthetic":
        target = replace(target, config=replace(target.config, data=replace(target.config.data, source="dali")))
    with world(target.config) as here:
        if here.size > 1:
            raise ConfigError(f"predict is for one process, and here are {here.size}: start it without torchrun")
        precision.set_kernels(target.config, here.device)
        found = predictions(target, files, here, top=top, ema=ema)
    if grid:
        draw_grid(grid, [(p.file, f"{p.words[0]} {p.probabilities[0]:.0%}") for p in found])
    print("\n".join(json.dumps(p.record()) for p in found) if how == "json" else _table(found))
    return 0


def find_images(named: list[str]) -> list[str]:
    """The files that files, folders and globs stand for, in that order, each once; ConfigError where one has none."""
    if not named:
        raise ConfigError("no image is named: give files, folders or globs")
    found: dict[str, None] = {}
    for name in named:
        if os.path.isdir(name):
            inside = [f for f in sorted(Path(name).rglob("*")) if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()]
            if not inside:
                raise ConfigError(f"{name} holds no images ({', '.join(IMAGE_SUFFIXES)}): give another folder")
            found |= dict.fromkeys(map(str, inside))
        elif os.path.exists(name):
            found[name] = None
        elif matches := sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path)):
            found |= dict.fromkeys(matches)
        else:
            raise ConfigError(f"{name} is no file, no folder and no glob that anything matches: correct the name")
    return list(found)


def predictions(target: Target, files: list[str], here: World, *, top: int, ema: bool) -> list[Prediction]:
    """The classes of `files`, in their order; ConfigError names all of them that are no images."""
    config = target.config
    index = _index(files)
    model = target.model(ema=ema)
    check_sizes(config.model, model, {"data.eval_size": config.data.crop_size})
    layout = torch.channels_last if config.precision.channels_last else torch.contiguous_format
    model = model.to(here.device, memory_format=layout)
    dtype = precision.amp_dtype(config.precision, here.device)
    rows, values, classes = [], [], []
    data = replace(config.data, on_error="skip", max_skipped=1.0)  # so that all that is bad can be named
    batches = EvaluationBatches(replace(config, data=data), index, here, min(_BATCH, len(files)))
    with torch.inference_mode():
        for images, _, held in batches.with_rows():
            with autocast(dtype, here.device):
                probabilities = _logits(model, images, config).softmax(1)
            best = probabilities.topk(min(top, probabilities.shape[1]))
            rows += held.tolist()
            values += best.values.tolist()
            classes += best.indices.tolist()
            count = probabilities.shape[1]
    if batches.salvage.bad:
        raise _refused([(files[row], "cannot be decoded") for row in sorted(batches.salvage.bad)], len(files))
    names = target.classes or tuple(f"class{label}" for label in range(count))
    words = labels.words(names, config.data.root)
    order = np.argsort(rows)
    return [
        Prediction(files[rows[at]], [names[c] for c in classes[at]], [words[c] for c in classes[at]], values[at])
        for at in order
    ]


def _logits(model: torch.nn.Module, images: torch.Tensor, config: Config) -> torch.Tensor:
    logits = model(images).float()
    return (logits + model(images.flip(3)).float()) / 2 if config.loop.eval_flip else logits


def _index(files: list[str]) -> Index:
    """A table of `files`, without labels; ConfigError names all that are no images."""
    paths = [os.path.abspath(file) for file in files]
    root = Path(os.path.commonpath([os.path.dirname(path) for path in paths]))
    below = [os.path.relpath(path, root) for path in paths]
    rows, bad = measure_all(root, below)
    if bad:
        shown = dict(zip(below, files))
        raise _refused([(shown[name], reason) for name, reason in bad], len(files))
    return assemble(root, ("",), np.zeros(len(files)), np.asarray(rows, np.int64), below)


def _refused(bad: list[tuple[str, str]], count: int) -> DataError:
    names = "; ".join(f"{file} {reason}" for file, reason in bad)
    return DataError(f"{len(bad)} of {count} files: {names}; leave them out, nothing was predicted")


def _table(found: list[Prediction]) -> str:
    return "\n".join(_lines(found))


def _lines(found: list[Prediction]) -> Iterator[str]:
    width = max(len(prediction.file) for prediction in found)
    for prediction in found:
        for place, (name, p) in enumerate(zip(prediction.words, prediction.probabilities)):
            yield f"{prediction.file if place == 0 else '':<{width}}  {p:>7.2%}  {name}"
