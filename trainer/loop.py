"""The training loop: steps, and nothing else. No files, no prints, no ranks, no waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from trainer.data.loader import Batch
from trainer.ema import Average
from trainer.metrics import sums
from trainer.optim import Clip, set_lr
from trainer.precision import autocast
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
    scaler: torch.amp.GradScaler
    lr_at: Callable[[int], float]
    device: torch.device
    dtype: torch.dtype | None  # to autocast to
    accumulation: int
    clip: Clip | None
    average: Average | None  # of the weights, beside them
    teacher: Teacher | None
    uphill: Callable[[int], float]  # how far the gradient of a step is taken uphill; 0: where the weights stand
    mix: Mixing | None  # None: nothing is mixed
    seed: int  # of what the network draws (dropout): a function of (seed, step), so that nothing needs saving


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step; tensors are on the device and not yet waited for."""

    step: int
    lr: float
    totals: torch.Tensor  # float64 (5,): trainer.metrics.sums of this rank's images, then the gradient's norm
    data_seconds: float  # the host's wait for batches


class _Mixed(NamedTuple):
    """A forward batch: what the loss is taken of, and the labels that accuracy is counted by."""

    images: torch.Tensor
    targets: torch.Tensor  # labels int64 (n,), or probabilities (n, classes)
    labels: torch.Tensor


def train_steps(learner: Learner, batches: Iterator[Batch], steps: Iterable[int]) -> Iterator[StepRecord]:
    """Take `steps` one after the other, yielding a record after each."""
    learner.model.train()
    for step in steps:
        lr = learner.lr_at(step)
        set_lr(learner.optimizer, lr)
        torch.manual_seed(learner.seed + step)
        totals = torch.zeros(5, dtype=torch.float64, device=learner.device)
        waited, seen = 0.0, []
        for micro in range(learner.accumulation):
            start = time.perf_counter()
            images, labels = next(batches)
            waited += time.perf_counter() - start
            batch = _Mixed(images, labels, labels)
            if learner.mix is not None:
                batch = _Mixed(*learner.mix(images, labels, step, micro), labels)
            totals[:4] += _accumulate(learner, batch, last=micro == learner.accumulation - 1)
            if learner.uphill(step):  # otherwise an accumulated step would hold all of its images
                seen.append(batch)
        if learner.uphill(step):
            _gradient_uphill(learner, step, seen)
        totals[4] = _update(learner)
        if learner.average is not None:
            learner.average.update(step)
        yield StepRecord(step, lr, totals, waited)


def _accumulate(learner: Learner, batch: _Mixed, *, last: bool) -> torch.Tensor:
    """One forward and backward pass; only the last of a step reduces gradients over the ranks."""
    local = nullcontext() if last or not hasattr(learner.model, "no_sync") else learner.model.no_sync()
    with local:
        with autocast(learner.dtype, learner.device):
            logits = learner.model(batch.images)
            if learner.dtype is not None:
                logits = logits.float()
            loss = learner.criterion(logits, batch.targets)
            if learner.teacher is not None:
                loss = learner.teacher.blended(loss, logits, batch.images)
        learner.scaler.scale(loss / learner.accumulation).backward()
    return sums(loss, logits, batch.labels)


def _gradient_uphill(learner: Learner, step: int, batches: list[_Mixed]) -> None:
    """Take the gradients of `batches` anew, uphill of the weights, with the same dropout."""
    torch.manual_seed(learner.seed + step)
    with uphill(learner.model, learner.uphill(step)):
        for batch in batches:
            _accumulate(learner, batch, last=batch is batches[-1])


def _update(learner: Learner) -> torch.Tensor:
    """Apply the gradients; returns their norm, a scalar on the device."""
    learner.scaler.unscale_(learner.optimizer)
    parameters = [p for group in learner.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if learner.clip is not None:
        learner.clip([p for p in parameters if p.grad is not None], norm)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    return norm.detach()
