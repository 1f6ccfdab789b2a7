"""What a network takes for what: counted on the device while it is evaluated, put together over the ranks once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainer.distributed import World

LARGEST = 2000  # classes whose pairs are counted: a matrix of 16 MB; beyond it only how many of each are right


@dataclass(frozen=True)
class Mistake:
    """A wrong answer."""

    row: int  # of the evaluation index
    actual: int  # class
    predicted: int
    probability: float  # of the predicted class


@dataclass(frozen=True)
class Findings:
    """Of a whole evaluation."""

    counts: torch.Tensor  # images of each class, int64 (classes,)
    right: torch.Tensor  # of them those answered right, int64 (classes,)
    pairs: list[tuple[int, int, int]]  # (actual, predicted, images), the most frequent first; empty beyond LARGEST
    mistakes: list[Mistake]  # the most confident first


class Confusion:
    """Counts of this rank's images, and its most confident mistakes. `add` never waits for the device."""

    def __init__(self, classes: int, keep: int, world: World) -> None:
        """
        Args:
            classes: logits of the network.
            keep: how many mistakes.
        """
        self._classes, self._keep, self._world = classes, keep, world
        width = classes if classes <= LARGEST else 2  # of a row: what it was taken for, or whether it was right
        self._counts = torch.zeros(classes * width, dtype=torch.int32, device=world.device)
        # Row, actual, predicted, and the bits of the probability, of the most confident mistakes so far.
        self._mistakes = torch.zeros(keep, 4, dtype=torch.int32, device=world.device)

    def add(self, logits: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> None:
        """Count a batch.

        Args:
            logits: float32 (n, classes).
            labels: int64 (n,).
            rows: of the evaluation index, int64 (n,), rising from batch to batch.
        """
        top, predicted = logits.max(1)
        wrong = predicted != labels
        column = predicted if self._classes <= LARGEST else (~wrong).long()
        width = len(self._counts) // self._classes
        self._counts.index_add_(0, labels * width + column, torch.ones_like(labels, dtype=torch.int32))
        if not self._keep:
            return
        # A NaN is nobody's confidence; no mistake has probability 0, so zeros are free places.
        probability = ((top - logits.logsumexp(1)).exp() * wrong).nan_to_num(0.0)
        bits = probability.float().view(torch.int32)  # of what is not negative: in the same order
        batch = torch.stack([rows.int(), labels.int(), predicted.int(), bits], dim=1)
        both = torch.cat([self._mistakes, batch])
        # Stable, and rows rise: of equals the first row stays, for any number of ranks.
        best = both[:, 3].sort(descending=True, stable=True).indices[: self._keep]
        self._mistakes = both[best]

    def total(self) -> Findings:
        """Of all ranks' images, in one reduction; every rank calls it and gets the same."""
        world, size = self._world, self._mistakes.numel()
        places = torch.zeros(world.size * size, dtype=torch.int32, device=world.device)
        places[world.rank * size : (world.rank + 1) * size] = self._mistakes.flatten()
        summed = world.sum(torch.cat([self._counts, places])).cpu()
        counts, mistakes = summed[: len(self._counts)], summed[len(self._counts) :].view(-1, 4)
        table = counts.view(self._classes, -1).long()
        right, pairs = table[:, -1], []
        if self._classes <= LARGEST:
            right, pairs = table.diagonal().clone(), _pairs(table)
        confident = mistakes[:, 3].view(torch.float32).tolist()
        found = [Mistake(*row[:3], p) for row, p in zip(mistakes.tolist(), confident) if p > 0]
        found.sort(key=lambda one: (-one.probability, one.row))
        return Findings(table.sum(1), right, pairs, found[: self._keep])


def _pairs(table: torch.Tensor) -> list[tuple[int, int, int]]:
    off = table.clone().fill_diagonal_(0)
    where = off.nonzero()
    counts = off[where[:, 0], where[:, 1]]
    order = counts.sort(descending=True, stable=True).indices
    return [(*where[i].tolist(), int(counts[i])) for i in order.tolist()]
