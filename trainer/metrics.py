"""Sums on the device: one reduction over the ranks and one division at the end, never a mean of means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from trainer.distributed import World


@dataclass(frozen=True)
class Averages:
    """Averages over `count` images; accuracies in percent."""

    loss: float
    top1: float
    top5: float
    count: int


def sums(loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(summed loss, images right, images right within five, images) as float64 (4,), on the device.

    Args:
        loss: the batch's mean loss, a scalar.
        logits: (n, classes).
        labels: int64 (n,).
    """
    position = target_position(logits.detach(), labels)
    n = len(labels)
    right = torch.stack([(position < 1).sum(), (position < 5).sum()])
    return torch.cat([(loss.detach().double() * n).reshape(1), right.double(), right.new_full((1,), n).double()])


def target_position(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many classes stand before the right one, int64 (n,): cheaper than sorting, and the same as a stable sort.

    Equal logits rank by class number, so a network that answers the same for all classes is not right for all; a NaN
    stands before everything, so a broken network is right for none.
    """
    target = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    before = ~(logits <= target) | ((logits == target) & (classes < labels[:, None]))
    return before.sum(1)


def gradient_norms(model: nn.Module) -> torch.Tensor:
    """The 2-norm of each parameter's gradient, in the model's order, float64 (parameters,); NaN where there is none."""
    first = next(model.parameters())
    nothing = first.new_full((), torch.nan, dtype=torch.float64)
    norms = [nothing if p.grad is None else torch.linalg.vector_norm(p.grad).double() for p in model.parameters()]
    return torch.stack(norms)


class Pending:
    """Sums over all ranks that are still on their way to the host.

    Reading at once would stop the host until the device has caught up. `read()` waits only for the moment of
    construction, so it is free when called a step later.
    """

    def __init__(self, totals: torch.Tensor, world: World) -> None:
        totals = world.sum(totals.clone())
        self._event: torch.cuda.Event | None = None
        if totals.is_cuda:
            # Into pinned memory: a copy to any other would wait for the device here and now.
            self._totals = torch.empty_like(totals, device="cpu", pin_memory=True).copy_(totals, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._totals = totals

    def read(self) -> Averages:
        return averages(self.values())

    def values(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._totals.tolist()


def averages(totals: list[float]) -> Averages:
    """From [summed loss, right, right within five, images]."""
    loss, top1, top5, count = totals[:4]
    return Averages(loss / count, 100 * top1 / count, 100 * top5 / count, int(count))
