"""A moving average of the weights whose memory is counted in samples, so that it is the same at any batch size."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn

from trainer.config import Ema
from trainer.models import build
from trainer.plan import Plan


def decay_at(step: int, options: Ema, plan: Plan) -> float | None:
    """The share that the average keeps of itself after step `step` (from 0), None where it is not updated.

    0 until ema.start_epoch, so the average is a copy till then, as torchvision's is during its warm-up.
    """
    assert options.half_life is not None
    taken = step + 1
    if taken % options.every:
        return None
    since = taken * plan.global_batch - options.start_epoch * plan.samples
    if since <= 0:
        return 0.0
    half_life = options.half_life if options.rampup is None else min(options.half_life, options.rampup * since)
    return 0.5 ** (options.every * plan.global_batch / half_life)


class Average:
    """A copy of the bare network whose parameters and statistics are averages, of each rank its own."""

    def __init__(self, model: nn.Module, options: Ema, plan: Plan) -> None:
        self._source, self._options, self._plan = build.unwrap(model), options, plan
        self.model = copy.deepcopy(self._source).requires_grad_(False)
        self.decay: float | None = None  # of the last update of this process

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after step `step` into the average; a few kernels, and no waiting for them."""
        decay = decay_at(step, self._options, self._plan)
        if decay is None:
            return
        self.decay = decay
        averages, counters = [], []
        for mine, now in zip(_tensors(self.model), _tensors(self._source)):
            (averages if mine.is_floating_point() else counters).append((mine, now))
        torch._foreach_lerp_([mine for mine, _ in averages], [now for _, now in averages], 1 - decay)
        for mine, now in counters:  # how many batches BatchNorm has seen
            mine.copy_(now)


def _tensors(model: nn.Module) -> itertools.chain[torch.Tensor]:
    return itertools.chain(model.parameters(), model.buffers())
