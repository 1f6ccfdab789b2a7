"""From the config to what a training step needs: the network on its device, optimiser, loss, scaler, schedule."""

from __future__ import annotations

import torch

from trainer import losses, mix, optim, precision, schedule
from trainer.config import Config, ConfigError
from trainer.data.loader import DataSet
from trainer.distributed import World
from trainer.loop import Learner, Mixing
from trainer.models import build
from trainer.nonfinite import Skipping
from trainer.plan import Plan


def create(config: Config, plan: Plan, here: World, data: DataSet) -> Learner:
    """The network on its device, its optimiser, loss, scaler and schedule; ConfigError if they do not fit the data."""
    classes = _classes(config, data)
    torch.manual_seed(config.seed)
    model = build.create(config.model, classes)
    if config.model.weights:
        build.load_weights(model, config.model.weights)
    dtype = precision.amp_dtype(config.precision, here.device)
    model = build.parallelize(
        model,
        here,
        channels_last=config.precision.channels_last,
        compile=config.precision.compile,
        bucket_mb=config.distributed.bucket_mb,
        sync_bn=config.distributed.sync_bn,
    )
    build.settle_buckets(model, here, config.data.image_size)
    return Learner(
        model=model,
        optimizer=optim.create(config.optim, model, here.device),
        criterion=losses.create(config.loss),
        scaler=precision.grad_scaler(config.precision, dtype, here.device),
        lr_at=lambda step: schedule.lr_at(step, config.schedule, config.optim, plan),
        device=here.device,
        dtype=dtype,
        accumulation=plan.accumulation,
        clip_norm=config.optim.clip_norm,
        mix=_mixing(config, plan, here, classes),
        skipping=Skipping.of(build.unwrap(model)) if config.loop.on_nonfinite == "skip" else None,
        # Ranks and seeds a long way apart; the step is added to it.
        seed=(config.seed * 1_000_003 + here.rank) % 2**38 << 24,
    )


def _classes(config: Config, data: DataSet) -> int:
    """Classes of the network: as many as the data has, or as many as asked for if that is enough."""
    asked, present = config.model.num_classes, len(data.classes)
    if asked is not None and asked < present:
        raise ConfigError(
            f"model.num_classes={asked}, but the data has {present} classes: use {present}, or leave it out"
        )
    return asked or present


def _mixing(config: Config, plan: Plan, here: World, classes: int) -> Mixing | None:
    """Mixup and CutMix of this rank's forward batches, None where nothing is mixed; ConfigError if a pair is cut."""
    if not config.mix.on:
        return None
    if plan.batch % 2:
        raise ConfigError(
            f"mix.mixup or mix.cutmix pairs images, and a forward batch holds {plan.batch} of them: "
            "choose global_batch_size and max_batch_per_gpu so that it is even"
        )
    first = here.rank * plan.batch * plan.accumulation
    return lambda images, labels, step, micro: mix.mix(
        images, labels, config.mix, classes, config.seed, step, first + micro * plan.batch
    )
