"""What the steps since the last record gave, summed on the device and read a step late."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from trainer.config import Config
from trainer.distributed import World
from trainer.loop import Learner, StepRecord
from trainer.metrics import Averages, Pending, averages
from trainer.models.build import unwrap
from trainer.nonfinite import Trouble, demand_finite


@dataclass(frozen=True)
class Due:
    """A record to be read a step later."""

    step: int
    lr: float
    totals: Pending  # trainer.loop.StepRecord.totals, then the longest row of bad steps
    trouble: Trouble
    norms: Pending | None = None  # of each gradient of the last step


@dataclass(frozen=True)
class Sums:
    """What `steps` steps up to a record gave, over all ranks."""

    averages: Averages | None  # None: every step was skipped
    grad_norm: float  # mean
    skipped: int  # steps that no rank took
    norms: dict[str, float | None]  # of each gradient of the last step, by parameter; None: not finite or not there


class Tally:
    """The sums since the last record; `window` holds them, float64 (7,), so that a checkpoint can."""

    def __init__(self, config: Config, learner: Learner, here: World, window: torch.Tensor) -> None:
        self._here, self._window = here, window
        self._scaled = learner.scaler.is_enabled()
        self._trouble = Trouble(here.device)
        self._norms: torch.Tensor | None = None
        self._names = [name for name, _ in unwrap(learner.model).named_parameters()] if learner.norms_at else []
        self._limit = math.inf
        if learner.skipping:
            # A loss scaler may have to halve its scale that often before anything is wrong.
            self._limit = config.loop.nonfinite_limit + self._scaled * int(math.log2(config.precision.loss_scale))

    def add(self, record: StepRecord) -> None:
        self._window += record.totals
        self._trouble.add(record.step, record.bad)
        self._norms = record.norms

    def cut(self, step: int, lr: float) -> Due:
        """The record of the steps before `step`, on its way to the host; the next begins."""
        due = self._on_its_way(step, lr, self._trouble.cut())
        self._window.zero_()
        if self._norms is None:
            return due
        # Equal on every rank, and added up over them.
        return replace(due, norms=Pending(self._norms / self._here.size, self._here))

    def read(self, due: Due) -> Sums:
        """The record; NonFiniteError, on every rank, if its sums are not finite or too many steps in a row were not."""
        *totals, norms, taken, skipped, longest = due.totals.values()
        taken, skipped = round(taken / self._here.size), round(skipped / self._here.size)
        # An infinite norm under a loss scaler is its business: it skips that step and lowers the scale.
        value = totals[0] if self._scaled else totals[0] + norms
        if round(longest) >= self._limit:
            value = math.nan
        demand_finite(value, due.step - taken - skipped, due.step - 1, lambda: self.blame(due))
        found = averages(totals) if taken else None
        each = due.norms.values() if due.norms else []
        by_name = {name: norm if math.isfinite(norm) else None for name, norm in zip(self._names, each)}
        return Sums(found, norms / self._here.size / max(taken, 1), skipped, by_name)

    def blame(self, due: Due) -> str:
        """Whose the first bad step was, in words. Every rank calls it."""
        return due.trouble.blame(self._here)

    def check(self, step: int) -> None:
        """NonFiniteError if the steps since the last record, up to `step`, are not fit to be saved."""
        self.read(self._on_its_way(step, 0.0, self._trouble))

    def _on_its_way(self, step: int, lr: float, trouble: Trouble) -> Due:
        longest = trouble.longest.reshape(1) / self._here.size  # the same on every rank, and added up over them
        return Due(step, lr, Pending(torch.cat([self._window, longest]), self._here), trouble)
