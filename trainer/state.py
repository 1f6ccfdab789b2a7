"""What a run is at a step boundary: everything that a checkpoint must hold to go on as if never stopped.

The order of the data and what the augmentations and the network draw are functions of the step, so nothing of them is
here but the step itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from trainer.distributed import World
from trainer.loop import Learner
from trainer.models import build
from trainer.models.buffers import mean_buffers


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
        # Since the last record: trainer.metrics.sums, then the gradients' norms and their number.
        self.window = torch.zeros(6, dtype=torch.float64, device=here.device)

    def gather(self) -> list[dict[str, Any]]:
        """What each rank has of its own, by rank; every rank calls it."""
        own = {"buffers": _buffers(self.model), "window": self.window.cpu()}
        return self._here.gather(own | ({"ema": _buffers(self.average)} if self.average else {}))

    def state_dict(self, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        """The state to save, with `ranks` from `gather()`."""
        mean = mean_buffers([rank["buffers"] for rank in ranks])
        average = {}
        if self.average:
            average = {"ema": self.average.state_dict() | mean_buffers([rank["ema"] for rank in ranks])}
        return average | {
            "model": self.model.state_dict() | mean,
            "optimizer": self.learner.optimizer.state_dict(),
            "scaler": self.learner.scaler.state_dict(),
            "progress": asdict(self.progress),
            "ranks": ranks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what `state_dict` saved."""
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.load_state_dict(state["ema"])
        self.learner.optimizer.load_state_dict(state["optimizer"])
        self.learner.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        ranks = state["ranks"]
        if len(ranks) == self._here.size:
            mine = ranks[self._here.rank]
            self.model.load_state_dict(mine["buffers"], strict=False)
            if self.average:
                self.average.load_state_dict(mine["ema"], strict=False)
            self.window.copy_(mine["window"])
        elif self._here.is_main:  # the sums are added up over the ranks in the end: one may hold them all
            self.window.copy_(sum(rank["window"] for rank in ranks))


def _buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.cpu() for name, buffer in model.named_buffers()}
