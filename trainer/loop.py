"""The training loop: steps, and nothing else. No files, no prints, no ranks, no waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from trainer.data.loader import Batch
from trainer.ema import Average
from trainer.exposed import Backward, Wait
from trainer.metrics import gradient_norms, sums
from trainer.nonfinite import Skipping
from trainer.optim import Clip, set_lr
from trainer.precision import StaticScale, autocast
from trainer.sam import uphill
from trainer.teacher import Teacher

# (images, labels, step, which forward batch of the step) to (images, targets)
Mixing = Callable[[torch.Tensor, torch.Tensor, int, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What a step changes, and how."""

    model: nn.Module  # may be wrapped in DistributedDataParallel
    optimizer: torch.optim.Optimizer
    criterion: nn.Module
    scaler: torch.amp.GradScaler | StaticScale
    lr_at: Callable[[int], float]
    device: torch.device
    dtype: torch.dtype | None = None  # to autocast to
    accumulation: int = 1
    clip: Clip | None = None
    average: Average | None = None  # of the weights, beside them
    teacher: Teacher | None = None
    # How far uphill the gradient of a step is taken; 0: where the weights stand.
    uphill: Callable[[int], float] = lambda step: 0.0
    mix: Mixing | None = None  # None: nothing is mixed
    skipping: Skipping | None = None  # None: a gradient that is not finite is applied, and found out later
    norms_at: Callable[[int], bool] | None = None  # whether each gradient's norm is wanted of a step; None: never
    seed: int = 0  # of what the network draws (dropout): a function of (seed, step), so that nothing needs saving
    # Takes the step of a batch, in `whole`: trainer/graphs.py's; None: an operation after the other
    graphs: Callable[[Learner, Mixed], tuple[torch.Tensor, torch.Tensor]] | None = None


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step; tensors are on the device and not yet waited for."""

    step: int
    lr: float
    # float64 (7,): trainer.metrics.sums of this rank's images, the gradient's norm, 1 if the step was taken, 1 if
    # skipped; then all others are 0
    totals: torch.Tensor
    bad: torch.Tensor  # bool (2,): this rank's loss, the gradient's norm is not finite
    data_seconds: float  # the host's wait for batches
    waits: list[Wait]  # for gradients to be reduced
    norms: torch.Tensor | None  # float64 (parameters,): of each gradient, before clipping; None: not wanted


class Mixed(NamedTuple):
    """A forward batch: what the loss is taken of, and the labels that accuracy is counted by."""

    images: torch.Tensor
    targets: torch.Tensor  # labels int64 (n,), or probabilities (n, classes)
    labels: torch.Tensor


def train_steps(
    learner: Learner,
    batches: Iterator[Batch],
    steps: Iterable[int],
    enter: Callable[[str, int], object] = lambda phase, step: None,
) -> Iterator[StepRecord]:
    """Take `steps` one after the other, yielding a record after each.

    Args:
        enter: called with the name of what begins (data, forward, backward, update) and the step.
    """
    learner.model.train()
    for step in steps:
        lr = learner.lr_at(step)
        set_lr(learner.optimizer, lr)
        torch.manual_seed(learner.seed + step)
        drawn = _Drawn(learner, batches, step, enter)
        waits, norms = [], None
        if learner.graphs is not None:
            batch = drawn(0)
            enter("forward", step)  # and all that follows, at once
            totals, bad = learner.graphs(learner, batch)
        else:
            totals, bad, waits, norms = _operations(learner, drawn, step, enter)
        if learner.average is not None:  # after a skipped step of the weights and statistics that it left
            learner.average.update(step)
        yield StepRecord(step, lr, totals, bad, drawn.waited, waits, norms)


class _Drawn:
    """The forward batches of a step, mixed; `waited`: the host's seconds for them."""

    def __init__(
        self, learner: Learner, batches: Iterator[Batch], step: int, enter: Callable[[str, int], object]
    ) -> None:
        self._learner, self._batches, self._step, self._enter = learner, batches, step, enter
        self.waited = 0.0

    def __call__(self, micro: int) -> Mixed:
        self._enter("data", self._step)
        start = time.perf_counter()
        images, labels = next(self._batches)
        self.waited += time.perf_counter() - start
        if self._learner.mix is None:
            return Mixed(images, labels, labels)
        return Mixed(*self._learner.mix(images, labels, self._step, micro), labels)


def _operations(
    learner: Learner, drawn: _Drawn, step: int, enter: Callable[[str, int], object]
) -> tuple[torch.Tensor, torch.Tensor, list[Wait], torch.Tensor | None]:
    """A step as the host decides it: totals, bad, waits and norms of its record."""
    statistics = learner.skipping.snapshot() if learner.skipping else None
    totals, seen = torch.zeros(7, dtype=torch.float64, device=learner.device), []
    backward = Backward(learner.device, partial(enter, "backward", step))
    for micro in range(learner.accumulation):
        batch = drawn(micro)
        enter("forward", step)
        totals[:4] += _accumulate(learner, batch, backward, last=micro == learner.accumulation - 1)
        if learner.uphill(step):  # otherwise an accumulated step would hold all of its images
            # Copied, since a loader may reuse a batch once what was queued before the next one is done.
            seen.append(Mixed(*(each.clone() for each in batch)))
    if learner.uphill(step):
        _gradient_uphill(learner, step, seen, backward)
    enter("update", step)
    each = learner.norms_at is not None and learner.norms_at(step)
    totals[4], norms = _update(learner, each=each)
    return *_judged(learner, totals, statistics), backward.waits, norms


def whole(learner: Learner, batch: Mixed) -> tuple[torch.Tensor, torch.Tensor]:
    """A step of one forward batch, totals and bad of its record: the host decides nothing in it, so it can be recorded.

    The same arithmetic as that of train_steps, for a learner that accumulates nothing and goes nowhere uphill.
    """
    statistics = learner.skipping.snapshot() if learner.skipping else None
    totals = torch.zeros(7, dtype=torch.float64, device=learner.device)
    totals[:4] += _accumulate(learner, batch, lambda loss, *, reduces: loss.backward(), last=True)
    totals[4], _ = _update(learner, each=False)
    return _judged(learner, totals, statistics)


def _judged(
    learner: Learner, totals: torch.Tensor, statistics: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Totals and bad, after the update; a step to be skipped leaves no `statistics` behind."""
    bad = ~torch.stack([totals[0], totals[4]]).isfinite()
    totals[5] = 1
    if learner.skipping:
        learner.skipping.restore(statistics, ~bad[1])
        totals = torch.where(bad[1], 0.0, totals)
        totals[6] = bad[1]
    return totals, bad


def _accumulate(learner: Learner, batch: Mixed, backward: Callable[..., None], *, last: bool) -> torch.Tensor:
    """One forward and backward pass; only the last of a step reduces gradients over the ranks."""
    distributed = hasattr(learner.model, "no_sync")
    local = learner.model.no_sync() if distributed and not last else nullcontext()
    with local:
        with autocast(learner.dtype, learner.device):
            logits = learner.model(batch.images)
            if learner.dtype is not None:
                logits = logits.float()
            loss = learner.criterion(logits, batch.targets)
            if learner.teacher is not None:
                loss = learner.teacher.blended(loss, logits, batch.images)
        backward(learner.scaler.scale(loss / learner.accumulation), reduces=distributed and last)
    return sums(loss, logits, batch.labels)


def _gradient_uphill(learner: Learner, step: int, batches: list[Mixed], backward: Backward) -> None:
    """Take the gradients of `batches` anew, uphill of the weights, with the same dropout."""
    torch.manual_seed(learner.seed + step)
    with uphill(learner.model, learner.uphill(step)):
        for batch in batches:
            _accumulate(learner, batch, backward, last=batch is batches[-1])


def _update(learner: Learner, *, each: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Apply the gradients; returns their norm, a scalar on the device, and of each its own if asked for."""
    learner.scaler.unscale_(learner.optimizer)
    parameters = [p for group in learner.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norms = gradient_norms(learner.model) if each else None
    if learner.clip is not None:
        learner.clip([p for p in parameters if p.grad is not None], norm)
    if learner.skipping and not learner.scaler.is_enabled():  # a scaler leaves such steps out by itself
        learner.skipping.step(learner.optimizer, norm.isfinite())
    else:
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    return norm.detach(), norms
