"""The evaluate command: the accuracy of a run, of one checkpoint, or of the weights that a config names."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

from trainer import checkpoint, configfile, precision
from trainer.config import Config, ConfigError
from trainer.data.loader import EvaluationBatches, open_validation
from trainer.distributed import World, world
from trainer.evaluate import evaluate
from trainer.models import build
from trainer.models.start import check_sizes


def evaluate_target(target: str, overrides: list[str]) -> int:
    """Print the accuracy of `target` as one JSON line; 0. ConfigError if there is nothing to evaluate.

    Args:
        target: a run folder (its newest checkpoint), a checkpoint folder, or a CONFIG with model.weights.
        overrides: `key=value` on top of the config found there.
    """
    config, weights = _find(Path(target), overrides)
    with world(config) as here:
        precision.set_kernels(config, here.device)
        result = _evaluate(config, weights, here)
        if here.is_main:
            print(json.dumps({"target": str(weights), **result}))
    return 0


def _evaluate(config: Config, weights: Path, here: World) -> dict[str, float]:
    index = open_validation(config, here)
    model = build.create(config.model, config.model.num_classes or len(index.classes))
    build.load_weights(model, weights)
    check_sizes(config.model, model, {"data.eval_size": config.data.crop_size})
    layout = torch.channels_last if config.precision.channels_last else torch.contiguous_format
    model = model.to(here.device, memory_format=layout)
    dtype = precision.amp_dtype(config.precision, here.device)
    batch = config.max_batch_per_gpu or max(1, min(256, config.global_batch_size // here.size))
    batches, flip = EvaluationBatches(config, index, here, batch), config.loop.eval_flip
    began = time.monotonic()
    found = evaluate(model, batches, here, dtype, flip=flip)
    assert found is not None, "nobody stops it"
    seconds = time.monotonic() - began
    result = {**asdict(found), "images_per_second": round(found.count / seconds, 1)}
    if build.has_ema(weights):
        build.load_weights(model, weights, ema=True)
        averaged = evaluate(model, batches, here, dtype, flip=flip)
        result |= {"ema_loss": averaged.loss, "ema_top1": averaged.top1, "ema_top5": averaged.top5}
    return result


def _find(target: Path, overrides: list[str]) -> tuple[Config, Path]:
    """The config and the weights that `target` stands for."""
    if (target / "config.yaml").exists():
        newest = checkpoint.newest_whole(target / "checkpoints")
        if newest is None:
            raise ConfigError(f"{target} has no checkpoint yet: train it first")
        return configfile.load(target / "config.yaml", overrides), newest
    if (target / "manifest.json").exists():
        checkpoint.verify(target)
        run = target.parent.parent
        return configfile.load(run / "config.yaml", overrides), target
    if target.is_dir():
        raise ConfigError(f"{target} is neither a run folder (config.yaml) nor a checkpoint (manifest.json)")
    config = configfile.load(target, overrides)
    if config.model.weights is None:
        raise ConfigError(f"{target} names no weights to evaluate: add model.weights=FILE")
    return config, Path(config.model.weights)
