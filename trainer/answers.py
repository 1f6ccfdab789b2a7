"""What a network answered, image by image: kept on the device while it is evaluated, and looked into afterwards."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from trainer.calibration import expected_error
from trainer.distributed import World
from trainer.metrics import target_position

PAIRS = 20  # confusions that are named


@dataclass(frozen=True)
class Answers:
    """The answers for n images, in the order of their rows."""

    rows: np.ndarray  # int64 (n,)
    labels: np.ndarray  # int64 (n,)
    predicted: np.ndarray  # int64 (n,)
    position: np.ndarray  # int64 (n,): how many classes stand before the right one
    confidence: np.ndarray  # float64 (n,): probability of the predicted class

    @property
    def right(self) -> np.ndarray:
        return self.position < 1

    def calibration_error(self) -> float:
        return expected_error(self.confidence, self.right)

    def per_class(self, classes: tuple[str, ...]) -> list[dict[str, Any]]:
        """Name, count, top1 and top5 in percent of each class that has images."""
        counts = np.bincount(self.labels, minlength=len(classes))
        first, five = (np.bincount(self.labels[self.position < n], minlength=len(classes)) for n in (1, 5))
        return [
            {
                "name": name,
                "count": int(count),
                "top1": round(100 * int(one) / int(count), 4),
                "top5": round(100 * int(within) / int(count), 4),
            }
            for name, count, one, within in zip(classes, counts, first, five)
            if count
        ]

    def confusions(self, classes: tuple[str, ...], most: int = PAIRS) -> list[dict[str, Any]]:
        """The pairs of classes that are taken for one another most often, in that order."""
        wrong = self.predicted != self.labels
        pairs, counts = np.unique(np.stack([self.labels[wrong], self.predicted[wrong]]), axis=1, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:most]
        return [
            {"actual": classes[pairs[0, i]], "predicted": classes[pairs[1, i]], "count": int(counts[i])} for i in order
        ]


class Observer:
    """Takes an evaluation's logits as they come, without waiting for the device."""

    def __init__(self) -> None:
        self._taken: list[tuple[torch.Tensor, ...]] = []

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> None:
        """Logits float32 (n, classes) of a batch, its labels and its rows of the index, int64 (n,)."""
        confidence, predicted = logits.softmax(1).max(1)
        self._taken.append((rows, labels, predicted, target_position(logits, labels), confidence.double()))

    def answers(self, world: World) -> Answers:
        """Those of all ranks; every rank calls it and gets the same."""
        columns = zip(*self._taken) if self._taken else [()] * len(fields(Answers))
        mine = [torch.cat(column).cpu().numpy() if column else np.empty(0, np.int64) for column in columns]
        whole = [np.concatenate(parts) for parts in zip(*world.gather(mine))]
        order = np.argsort(whole[0], kind="stable")
        return Answers(*(column[order] for column in whole))
