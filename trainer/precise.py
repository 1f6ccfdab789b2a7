"""Precise BatchNorm (Wu and Johnson, arXiv:2105.07576): statistics of the weights as they are, not as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from trainer.config import Config
from trainer.data.loader import DataSet, TrainingBatches
from trainer.distributed import World
from trainer.plan import Plan
from trainer.precision import autocast


@contextmanager
def precise_statistics(
    model: nn.Module, config: Config, data: DataSet, plan: Plan, here: World, step: int, dtype: torch.dtype | None
) -> Iterator[None]:
    """For the duration, BatchNorm statistics of the `loop.precise_bn` training images that follow `step`.

    Each rank takes those of its share, plainly averaged over the batches; then each has its own again. The images are
    decoded twice, here and by the steps that follow: a function of the step, and so the same in a resumed run. Mixed
    images are not what is evaluated, so nothing is mixed.
    """
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    batches = -(-config.loop.precise_bn // (plan.batch * plan.ranks))
    coming = TrainingBatches(config, data, plan, here, step)
    with autocast(dtype, here.device):
        update_bn((images for images, _ in islice(coming, batches)), model)
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
