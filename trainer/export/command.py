"""The export command: write weights, load them back, compare the logits, and only then put the file in place."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer import card, checkpoint, configfile
from trainer.config import Config, ConfigError, RunError
from trainer.data.loader import EvaluationBatches, open_validation
from trainer.distributed import World, world
from trainer.export import formats
from trainer.export.fold import fold
from trainer.export.libraries import Library, libraries
from trainer.models.start import check_sizes
from trainer.target import METADATA, Target, find

_IMAGES = 8
_TOLERANCE = 1e-4  # of the largest logit: float32 kernels in another order differ by about 1e-6


@dataclass(frozen=True)
class Examples:
    """Images (n, 3, size, size), and what they are."""

    images: Tensor
    what: str


def export(text: str, overrides: list[str], *, format: str, ema: bool, fold_bn: bool, output: str | None) -> int:
    """Write what `text` stands for (trainer.target.find) in `format`, and MODEL_CARD.md beside it; 0.

    RunError, and nothing is left behind, where what was written does not give the network's logits.
    """
    chosen = formats.find(format)
    if fold_bn and chosen.load is None:
        raise ConfigError(
            f"--fold-bn with --format {format}: no library's network has the layers that are left; leave it "
            f"out, or use one of: {', '.join(name for name, other in formats.FORMATS.items() if other.load)}"
        )
    target = find(text, overrides)
    if ema and not target.has_ema:
        raise ConfigError(f"--ema: {target.name} holds no averaged weights; leave it out")
    path = Path(output) if output else _default(target, format, chosen.suffix, ema=ema, folded=fold_bn)
    card.demand_free(path.parent, path.name)
    with world(target.config) as here:
        if here.size > 1:
            raise ConfigError(f"export is for one process, and here are {here.size}: start it without torchrun")
        model = target.model(ema=ema)
        check_sizes(target.config.model, model, {"data.eval_size": target.config.data.crop_size})
        examples = _examples(target.config, here)
    with torch.no_grad():
        _write(_Export(target, format, chosen, model, examples, ema), path, fold_bn)
    return 0


@dataclass(frozen=True)
class _Export:
    target: Target
    name: str
    format: formats.Format
    model: nn.Module
    examples: Examples
    ema: bool

    @property
    def classes(self) -> int:
        return self.model(self.examples.images[:2]).shape[1]


def _write(job: _Export, path: Path, fold_bn: bool) -> None:
    """Write aside, compare, and give the file and its card their names."""
    images = job.examples.images
    model, folded = job.model, 0
    if fold_bn:
        model = copy.deepcopy(job.model)
        folded = fold(model, images)
        if not folded:
            raise ConfigError(
                f"--fold-bn: {job.target.config.model.name} has no BatchNorm behind a convolution; leave it out"
            )
    known = libraries(job.target.config.model, job.classes)
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        job.format.write(model, images, aside, {METADATA: json.dumps(_metadata(job, known))})
        largest = _compare(job, _loaders(job, aside, known))
        check = (
            f"Loaded back, its logits for {job.examples.what} differ from the trained network's by at most "
            f"{largest:.1e} of the largest logit."
        )
        facts = _facts(job, path.name, folded, check, known)
        os.replace(aside, path)
        aside.write_text(card.text(facts))
        os.replace(aside, path.parent / card.NAME)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror or error}): give --output FILE") from error
    finally:
        aside.unlink(missing_ok=True)
    print(f"{path} is written. {check}")
    if folded:
        print(f"{folded} BatchNorms are folded into their convolutions")


def _loaders(job: _Export, path: Path, known: list[Library]) -> dict[str, Callable[[], formats.Run]]:
    """Every way to load the file, by what it is loaded with."""
    if job.format.load is not None:
        return {job.name: lambda: job.format.load(path)}
    return {library.name: lambda library=library: library.load(path).eval() for library in known}


def _compare(job: _Export, loaders: dict[str, Callable[[], formats.Run]]) -> float:
    """The largest difference, as a share of the largest logit; RunError if it is too large for any of `loaders`."""
    images = job.examples.images
    expected = job.model(images)
    scale = max(float(expected.abs().max()), 1e-6)
    largest = 0.0
    for who, load in loaders.items():
        run = load()
        # One image too: the batch size must not be that of the examples.
        for count in (len(images), 1):
            found = run(images[:count])
            differ = float((found - expected[:count]).abs().max()) / scale
            if found.shape != expected[:count].shape or not differ <= _TOLERANCE:
                raise RunError(
                    f"loaded back with {who}, the logits of {count} images differ by {differ:.1e} of the largest, more "
                    f"than {_TOLERANCE:g}: nothing is written"
                )
            largest = max(largest, differ)
    return largest


def _metadata(job: _Export, known: list[Library]) -> dict[str, Any]:
    """What goes into the file: enough to build the network, to make its images and to name its classes."""
    config, data = job.target.config, job.target.config.data
    default = configfile.flat(Config())
    keys = ("name", "variant", "residual", "shortcut", "blurpool")
    model = {f"model.{key}": getattr(config.model, key) for key in keys}
    options = {key: value for key, value in model.items() if value != default[key]}
    options |= {"model.num_classes": job.classes, "data.image_size": data.crop_size}
    options |= {"data.eval_resize": data.short_side, "data.mean": list(data.mean), "data.std": list(data.std)}
    return {
        "architecture": known[0].network,
        "libraries": [library.name for library in known],
        "input_size": [3, data.crop_size, data.crop_size],
        "resize": data.short_side,
        "crop_ratio": round(data.crop_size / data.short_side, 6) if data.short_side else None,
        "mean": list(data.mean),
        "std": list(data.std),
        "interpolation": "bilinear",
        "classes": list(job.target.classes) if job.target.classes else None,
        "config": [f"{key}={json.dumps(value)}" for key, value in options.items()],
    }


def _facts(job: _Export, file: str, folded: int, check: str, known: list[Library]) -> card.Facts:
    target, top1, step = job.target, None, None
    if target.run is not None and target.weights is not None:
        saved = next((c for c in checkpoint.listing(target.weights.parent) if c.path == target.weights), None)
        top1, step = (saved.top1, saved.step) if saved else (None, None)
    lines = [(job.name, job.format.lines)]
    if job.format.load is None:
        lines = [(library.name, library.lines) for library in known]
    source = target.name
    if target.run is not None:
        source = f"{target.run.name}/{Path(target.name).name}"
    return card.Facts(
        file=file,
        format=job.name,
        config=target.config,
        classes=target.classes,
        source=source,
        ema=job.ema,
        folded=folded,
        check=check,
        loading=lines,
        run=target.run,
        top1=top1,
        step=step,
    )


def _default(target: Target, format: str, suffix: str, *, ema: bool, folded: bool) -> Path:
    """Where an export goes that nobody named: a folder of its own, with room for its card."""
    folder = f"{format}{'-ema' if ema else ''}{'-folded' if folded else ''}"
    home = target.run / "export" if target.run else Path("exports") / re.sub(r"[^\w.-]+", "-", Path(target.name).name)
    return home / folder / f"model{suffix}"


def _examples(config: Config, here: World) -> Examples:
    """The first images of the evaluation set where it is there, else noise of the same size."""
    size = config.data.crop_size
    if config.data.source != "synthetic" and Path(config.data.root).is_dir():
        index = open_validation(config, here)
        images, _ = next(iter(EvaluationBatches(config, index, here, min(_IMAGES, len(index)))))
        images = images.float().cpu().contiguous()
        if len(images) > 1:
            return Examples(images, f"{len(images)} images of {Path(config.data.root).name}")
    noise = torch.randn(_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    return Examples(noise, f"{_IMAGES} images of noise (data.root={config.data.root} is not here)")
