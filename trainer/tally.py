"""What the steps since the last record gave, summed on the device and read a step late."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from trainer.balance import Balance, figures
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
    totals: Pending  # trainer.loop.StepRecord.totals, the longest row of bad steps, the loss scale, Balance.cut
    trouble: Trouble
    ema_decay: float | None
    norms: Pending | None = None  # of each gradient of the last step


@dataclass(frozen=True)
class Sums:
    """What `steps` steps up to a record gave, over all ranks."""

    averages: Averages | None  # None: every step was skipped
    grad_norm: float  # mean
    skipped: int  # steps that no rank took
    figures: dict[str, Any]  # loss_scale, ema_decay, and those of trainer.balance; None where there is no such thing
    norms: dict[str, float | None]  # of each gradient of the last step, by parameter; None: not finite or not there


class Tally:
    """The sums since the last record; `window` holds them, float64 (7,), so that a checkpoint can."""

    def __init__(self, config: Config, learner: Learner, here: World, window: torch.Tensor) -> None:
        self._here, self._window, self._learner = here, window, learner
        self._scaled = learner.scaler.is_enabled()
        self._balance = Balance(here)
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
        self._balance.add(record.data_seconds, record.waits)

    def pause(self) -> None:
        """Something other than a step took place."""
        self._balance.pause()

    def cut(self, step: int, lr: float) -> Due:
        """The record of the steps before `step`, on its way to the host; the next begins."""
        due = self._on_its_way(step, lr, self._trouble.cut(), self._balance.cut())
        self._window.zero_()
        if self._norms is None:
            return due
        # Equal on every rank, and added up over them.
        return replace(due, norms=Pending(self._norms / self._here.size, self._here))

    def read(self, due: Due) -> Sums:
        """The record; NonFiniteError, on every rank, if its sums are not finite or too many steps in a row were not."""
        values = due.totals.values()
        *totals, norms, taken, skipped, longest, scale = values[:9]
        taken, skipped = round(taken / self._here.size), round(skipped / self._here.size)
        # An infinite norm under a loss scaler is its business: it skips that step and lowers the scale.
        value = totals[0] if self._scaled else totals[0] + norms
        if round(longest) >= self._limit:
            value = math.nan
        demand_finite(value, due.step - taken - skipped, due.step - 1, lambda: self.blame(due))
        found = averages(totals) if taken else None
        each = due.norms.values() if due.norms else []
        by_name = {name: norm if math.isfinite(norm) else None for name, norm in zip(self._names, each)}
        more = {"loss_scale": scale if self._scaled else None, "ema_decay": due.ema_decay, "allreduce_fraction": None}
        return Sums(found, norms / self._here.size / max(taken, 1), skipped, more | figures(values[9:]), by_name)

    def blame(self, due: Due) -> str:
        """Whose the first bad step was, in words. Every rank calls it."""
        return due.trouble.blame(self._here)

    def check(self, step: int) -> None:
        """NonFiniteError if the steps since the last record, up to `step`, are not fit to be saved."""
        self.read(self._on_its_way(step, 0.0, self._trouble))

    def _on_its_way(self, step: int, lr: float, trouble: Trouble, balance: torch.Tensor | None = None) -> Due:
        # What is the same on every rank, and added up over them; scaling a 1 tells the scale without waiting for it.
        one = torch.ones(1, device=self._here.device)
        same = torch.cat([trouble.longest.reshape(1), self._learner.scaler.scale(one)]) / self._here.size
        parts = [self._window, same, *([] if balance is None else [balance])]
        average = self._learner.average
        return Due(step, lr, Pending(torch.cat(parts), self._here), trouble, average.decay if average else None)
