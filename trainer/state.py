"""What a run is at a step boundary: everything that a checkpoint must hold to go on as if never stopped.

The order of the data and what the augmentations and the network draw are functions of the step, so nothing of them is
here but the step itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from trainer.config import ConfigError
from trainer.distributed import World
from trainer.loop import Learner
from trainer.models import build
from trainer.models.buffers import mean_buffers
from trainer.plan import Plan
from trainer.snapshot import owned


@dataclass
class Progress:
    """How far a run has come; saved with it."""

    step: int = 0  # steps taken
    closed: int = 0  # the last step after which an epoch (or the run) was evaluated and saved
    best_top1: float | None = None  # percent
    last_top1: float | None = None
    best_ema_top1: float | None = None  # of the averaged weights
    last_ema_top1: float | None = None
    target_seconds: float | None = None  # wall_seconds when loop.stop_at was met
    wall_seconds: float = 0.0  # over all restarts

    def evaluated(self, top1: float, ema_top1: float | None) -> None:
        """Take down an evaluation of the weights and, where there is one, of their average."""
        self.last_top1, self.best_top1 = top1, max(top1, self.best_top1 or 0.0)
        if ema_top1 is not None:
            self.last_ema_top1, self.best_ema_top1 = ema_top1, max(ema_top1, self.best_ema_top1 or 0.0)


class RunState:
    """The network, its optimiser and scaler, the progress, and what each rank has of its own.

    A rank's own are the BatchNorm statistics of the images it has seen and its sums since the last record. A checkpoint
    holds every rank's, and under `model` their mean: the same number of ranks goes on bitwise, any other from the mean.
    """

    def __init__(self, learner: Learner, here: World) -> None:
        self.learner, self._here = learner, here
        self.model = build.unwrap(learner.model)
        self.average = learner.average.model if learner.average else None
        self.progress = Progress()
        # Since the last record, the sum of trainer.loop.StepRecord.totals.
        self.window = torch.zeros(7, dtype=torch.float64, device=here.device)

    def summary(self, plan: Plan) -> dict[str, Any]:
        """How far the run has come and what it has reached, for summary.json."""
        progress = self.progress
        averaged = {"best_ema_top1": progress.best_ema_top1, "last_ema_top1": progress.last_ema_top1}
        return {
            "best_top1": progress.best_top1,
            "last_top1": progress.last_top1,
            **(averaged if self.average is not None else {}),
            "epochs": round(progress.step * plan.global_batch / plan.samples, 4),
            "steps": progress.step,
        }

    def gather(self) -> list[dict[str, Any]]:
        """What each rank has of its own, by rank; every rank calls it."""
        own = {"buffers": _buffers(self.model), "window": self.window.cpu()}
        return self._here.gather(own | ({"ema": _buffers(self.average)} if self.average is not None else {}))

    def bulk(self) -> dict[str, Any]:
        """What nearly all of the memory of `state_dict` is for: the live tensors."""
        average = {"ema": self.average.state_dict()} if self.average is not None else {}
        return {"model": self.model.state_dict(), "optimizer": self.learner.optimizer.state_dict(), **average}

    def still(self) -> frozenset[int]:
        """`data_ptr()` of the tensors that only an update of the weights changes: what is trained, and its moments."""
        moments = (value for values in self.learner.optimizer.state.values() for value in values.values())
        tensors = [*self.model.parameters(), *(value for value in moments if isinstance(value, torch.Tensor))]
        return frozenset(tensor.data_ptr() for tensor in tensors)

    def state_dict(self, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        """The state to save, with `ranks` from `gather()`."""
        mean = mean_buffers([rank["buffers"] for rank in ranks])
        bulk = self.bulk()
        average = {}
        if self.average is not None:
            average = {"ema": bulk["ema"] | mean_buffers([rank["ema"] for rank in ranks])}
        return average | {
            "model": bulk["model"] | mean,
            "optimizer": bulk["optimizer"],
            "scaler": self.learner.scaler.state_dict(),
            "progress": asdict(self.progress),
            "ranks": ranks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what `state_dict` saved; ConfigError, and nothing is loaded, if that does not fit."""
        self.demand_fit(state)
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["ema"])
        # The optimiser keeps the tensors it is given, and those of a mapped file must not become what a run trains.
        self.learner.optimizer.load_state_dict(owned(state["optimizer"]))
        self.learner.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        ranks = state["ranks"]
        self.window.zero_()
        if len(ranks) == self._here.size:
            mine = ranks[self._here.rank]
            self.model.load_state_dict(mine["buffers"], strict=False)
            if self.average is not None:
                self.average.load_state_dict(mine["ema"], strict=False)
            self.window.copy_(mine["window"])
        elif self._here.is_main:  # the sums are added up over the ranks in the end: one may hold them all
            self.window.copy_(sum(rank["window"] for rank in ranks))

    def demand_fit(self, state: dict[str, Any]) -> None:
        """ConfigError that names the first thing in `state` which this network and optimiser have no place for."""
        try:
            mismatch = next(self._mismatches(state), None)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            mismatch = f"it is not laid out as a run's state is ({type(error).__name__}: {error})"
        if mismatch:
            raise ConfigError(mismatch)

    def _mismatches(self, state: dict[str, Any]) -> Iterator[str]:
        needed = ("model", "optimizer", "scaler", "progress", "ranks", *(["ema"] if self.average is not None else []))
        missing = [key for key in needed if key not in state]
        if missing:
            yield f"it has no {missing[0]}"
        yield from _differences("model", state["model"], self.model.state_dict(), whole=True)
        if self.average is not None:
            yield from _differences("ema", state["ema"], self.average.state_dict(), whole=True)
        yield from self._optimizer_mismatches(state["optimizer"])
        known = {field.name for field in fields(Progress)}
        yield from (f"progress.{key} is not known to this version" for key in state["progress"] if key not in known)
        if state["scaler"].keys() ^ self.learner.scaler.state_dict().keys():
            yield "scaler is of another precision.amp"
        buffers = dict(self.model.named_buffers())
        for number, rank in enumerate(state["ranks"]):
            yield from _differences(f"ranks.{number}", rank["buffers"], buffers, whole=True)
            if self.average is not None:
                yield from _differences(f"ranks.{number}.ema", rank["ema"], buffers, whole=True)
            yield from _differences(f"ranks.{number}", {"window": rank["window"]}, {"window": self.window}, whole=True)
        if not state["ranks"]:
            yield "ranks is empty"

    def _optimizer_mismatches(self, saved: dict[str, Any]) -> Iterator[str]:
        groups = self.learner.optimizer.param_groups
        if len(saved["param_groups"]) != len(groups):
            yield f"optimizer has {len(saved['param_groups'])} groups of parameters, this run {len(groups)}"
        parameters = {}
        for number, (theirs, ours) in enumerate(zip(saved["param_groups"], groups)):
            if len(theirs["params"]) != len(ours["params"]):
                yield (
                    f"optimizer.param_groups.{number} has {len(theirs['params'])} parameters, "
                    f"this run {len(ours['params'])}"
                )
            parameters |= dict(zip(theirs["params"], ours["params"]))
        for index, values in saved["state"].items():
            tensors = {name: v for name, v in values.items() if isinstance(v, torch.Tensor) and v.ndim}
            yield from _differences(f"optimizer.state.{index}", tensors, dict.fromkeys(tensors, parameters[index]))


def _differences(where: str, saved: dict[str, Any], ours: dict[str, Any], *, whole: bool = False) -> Iterator[str]:
    """What keeps the tensors `saved` from taking the place of `ours`; `whole`: there must be one for each."""
    for key, tensor in saved.items():
        if key not in ours:
            yield f"{where}.{key} is not in this run's network"
        elif tensor.shape != ours[key].shape:
            yield f"{where}.{key} is {tuple(tensor.shape)}, and {tuple(ours[key].shape)} in this run"
    if whole:
        yield from (f"{where}.{key} is missing" for key in ours if key not in saved)


def _buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.cpu() for name, buffer in model.named_buffers()}
