"""What is to be decoded: which rows, which window of each, and what happens to its pixels.

A feed is a function from the number of a forward batch to a chunk, and knows nothing of who decodes it: DALI
(trainer/data/decoder.py) and Pillow take the same chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from trainer.config import Augment, Config, Data
from trainer.data import policies
from trainer.data.augment import Windows, evaluation_windows, training_windows
from trainer.data.order import Order
from trainer.data.policies import Recipes
from trainer.data.salvage import Salvage
from trainer.data.table import Index
from trainer.plan import Plan

Batch = tuple[torch.Tensor, torch.Tensor]  # images (n, 3, size, size) in channels-last memory, labels int64 (n,)


def pixel_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Of the images in a batch: what is converted to half precision anyway comes as it."""
    return torch.float16 if device.type == "cuda" and config.precision.amp != "fp32" else torch.float32


@dataclass(frozen=True)
class Chunk:
    """One forward batch of n images."""

    rows: np.ndarray  # of the index, int64 (n,)
    windows: Windows
    size: int  # side of the images that reach the network, in pixels
    shapes: np.ndarray | None = None  # height and width of the whole image after its resize, int32 (n, 2): evaluation
    recipes: Recipes | None = None  # None: the pixels stay as they are


class TrainingFeed:
    """This rank's forward batches from a step on, without end."""

    def __init__(
        self,
        config: Config,
        index: Index,
        plan: Plan,
        salvage: Salvage,
        rank: int,
        step_of: Callable[[int], int],
    ) -> None:
        """As the class says.

        Args:
            step_of: from the number of a step since the start to the step whose images it takes.
        """
        self.augment, self.index = config.augment, index
        self.mode = "resized" if self.augment.crop == "resized" else "padded"
        self._config, self._plan, self._salvage = config, plan, salvage
        self._order = Order(config.seed, plan.samples, self.augment.repeats, plan.global_batch)
        self._acts = bool(policies.layers(self.augment)) or self.augment.erase > 0
        self._step_of, self._offset = step_of, rank * plan.batch * plan.accumulation

    def chunk(self, number: int) -> Chunk:
        """Forward batch `number`, from 0: `plan.accumulation` of them are a step."""
        plan, config, index = self._plan, self._config, self.index
        step = self._step_of(number // plan.accumulation)
        first = step * plan.global_batch + self._offset + number % plan.accumulation * plan.batch
        epochs, rows, repeats = self._order.at(first, plan.batch)
        rows = self._salvage.replaced(rows)
        size = image_size(config.data, plan, step)
        windows = training_windows(
            self.augment, size, config.seed, (epochs, rows, repeats), (index.widths[rows], index.heights[rows])
        )
        recipes = None
        if self._acts:
            augment = strengthened(self.augment, config.data, plan, step)
            recipes = policies.draw(augment, size, config.seed, epochs, rows, repeats)
        return Chunk(rows, windows, size, recipes=recipes)


class EvaluationFeed:
    """Some rows in their order, the last chunk shorter; chunk() raises StopIteration beyond it."""

    mode = "center"
    augment = None

    def __init__(self, data: Data, index: Index, salvage: Salvage, rows: np.ndarray, batch: int) -> None:
        self.index = index
        self._data, self._salvage, self._rows, self._batch = data, salvage, rows, batch

    def chunk(self, number: int) -> Chunk:
        """Batch `number`, from 0; without what cannot be decoded, so perhaps empty."""
        rows = self._rows[number * self._batch : (number + 1) * self._batch]
        if not len(rows):
            raise StopIteration
        rows = self._salvage.sound(rows)
        size = self._data.crop_size
        width, height, windows = evaluation_windows(
            self._data.short_side, size, self.index.widths[rows], self.index.heights[rows]
        )
        return Chunk(rows, windows, size, shapes=np.stack([height, width], axis=1))


Feed = TrainingFeed | EvaluationFeed


def image_size(data: Data, plan: Plan, step: int) -> int:
    """Side of the training images at `step` in pixels: the same during an epoch, rising over `data.ramp` of the run."""
    if data.start_size is None:
        return data.image_size
    size = data.start_size + (data.image_size - data.start_size) * _risen(data, plan, step)
    return min(data.image_size, max(data.start_size, round(size / data.size_step) * data.size_step))


def strengthened(augment: Augment, data: Data, plan: Plan, step: int) -> Augment:
    """`augment` at the strength of `step`: magnitude, jitter and erasing rise from `start_strength` over `data.ramp`.

    With the image size, as in EfficientNetV2 (arXiv:2104.00298): small images are weakly augmented.
    """
    if augment.start_strength == 1:
        return augment
    share = augment.start_strength + (1 - augment.start_strength) * _risen(data, plan, step)
    keys = ("magnitude", "brightness", "contrast", "saturation", "hue", "erase")
    return replace(augment, **{key: share * getattr(augment, key) for key in keys})


def _risen(data: Data, plan: Plan, step: int) -> float:
    """How much of the ramp is climbed in the epoch of `step`, 0 to 1: as much as when that epoch ends."""
    begin, end = (share * plan.epochs for share in data.ramp)
    return float(np.interp(plan.epoch_of(step) + 1, [begin, end], [0.0, 1.0]))
