"""Steps whose loss or gradient is not a finite number: whose they are, and how to take a run past them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from trainer.config import RunError
from trainer.distributed import World


class NonFiniteError(RunError):
    """The loss or the gradient is not a finite number."""


class Trouble:
    """The first bad step of this rank and the longest row of bad steps, on the device: nobody waits for them.

    The loss is that of this rank's images, so it tells whose they were; the gradient is averaged over the ranks before
    its norm is taken, so all see the same.
    """

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((2,), math.inf, dtype=torch.float64, device=device)  # by loss, by gradient
        self._row = torch.zeros((), dtype=torch.float64, device=device)
        self.longest = self._row  # steps in a row with a bad gradient, float64 scalar, the same on every rank

    def add(self, step: int, bad: torch.Tensor) -> None:
        """Count `step`, with `bad`: whether its loss and its gradient's norm are not finite, bool (2,)."""
        self._first = torch.minimum(self._first, torch.where(bad, float(step), math.inf))
        self._row = (self._row + 1) * bad[1]
        self.longest = torch.maximum(self.longest, self._row)

    def cut(self) -> Trouble:
        """What was counted so far; a row that has not ended counts on here."""
        before = Trouble(self._first.device)
        before._first, before.longest = self._first, self.longest
        self._first = torch.full_like(self._first, math.inf)
        self.longest = self._row
        return before

    def blame(self, here: World) -> str:
        """Which rank's loss was bad first, and in which step, in words. Every rank calls it; waits for the device."""
        firsts = here.gather(self._first.tolist())
        step = min(loss for loss, _ in firsts)
        if step < math.inf:
            ranks = ", ".join(str(rank) for rank, (loss, _) in enumerate(firsts) if loss == step)
            return f"first in step {step:.0f}, in the loss of rank {ranks}"
        step = min(gradient for _, gradient in firsts)
        return f"first in the gradient of step {step:.0f}, every rank's loss being finite" if step < math.inf else ""


@dataclass(frozen=True)
class Skipping:
    """Keeps a step whose gradient is not finite from changing anything: weights, optimiser, BatchNorm statistics.

    The averaged gradient is the same on every rank, so all of them leave out the same steps without a word, and a fused
    optimiser reads the flag on the device. Any other is asked from the host, which costs a GPU one wait a step.
    """

    buffers: list[torch.Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Skipping:
        return cls([buffer for buffer in model.buffers() if buffer.is_floating_point()])

    def snapshot(self) -> torch.Tensor | None:
        """The statistics before the forward passes of a step."""
        return torch.cat([buffer.flatten() for buffer in self.buffers]) if self.buffers else None

    def restore(self, before: torch.Tensor | None, good: torch.Tensor) -> None:
        """Put back the statistics unless `good`, a bool scalar on the device."""
        if before is not None:
            chosen = torch.where(good, torch.cat([buffer.flatten() for buffer in self.buffers]), before)
            parts = chosen.split([buffer.numel() for buffer in self.buffers])
            for buffer, part in zip(self.buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))

    @staticmethod
    def step(optimizer: torch.optim.Optimizer, good: torch.Tensor) -> None:
        """Take the step if `good`."""
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = (~good).float()  # what GradScaler tells a fused optimiser
            optimizer.step()
        elif good:
            optimizer.step()


def demand_finite(value: float, first: int, last: int, blame: Callable[[], str]) -> None:
    """NonFiniteError, naming the steps, unless `value`, summed over steps `first` to `last`, is finite.

    Args:
        blame: says whose it is; called on every rank, as `value` is the same on all.
    """
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the loss or the gradient is {value} somewhere in steps {first} to {last}, {blame()}: "
            "lower optim.lr, lengthen schedule.warmup_epochs or set optim.clip_norm"
        )


@dataclass(frozen=True)
class Rollback:
    """A return to a save: the `skipped` steps' images after step `at` are left out."""

    at: int
    skipped: int
    why: str


def data_step(rollbacks: list[Rollback]) -> Callable[[int], int]:
    """From a step to the step whose images it takes, given what was left out before it."""
    return lambda step: step + sum(rollback.skipped for rollback in rollbacks if rollback.at <= step)
