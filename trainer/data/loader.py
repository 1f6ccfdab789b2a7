"""Batches for this rank, from any position on.

A training loader begins at a step and never ends: it decodes on into the next epoch while the last one is evaluated.
What a batch holds is a function of (seed, position) alone, so resuming costs nothing but that integer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.config import Config
from trainer.data.feeds import Batch as Batch
from trainer.data.feeds import EvaluationFeed, TrainingFeed, pixel_dtype
from trainer.data.index import check_same_classes, open_split
from trainer.data.prepare.pace import pace
from trainer.data.salvage import Salvage
from trainer.data.stage import stage
from trainer.data.table import DataError, Index
from trainer.distributed import World
from trainer.plan import Plan

VALIDATION_NAMES = ("val", "validation", "test")


@dataclass(frozen=True)
class DataSet:
    """The rows to train on and to evaluate on; `val` is None where nothing is evaluated."""

    train: Index | None  # None: synthetic
    val: Index | None
    samples: int
    classes: tuple[str, ...]
    digest: str  # of the training rows


def open_data(
    config: Config,
    world: World,
    progress: Callable[[int, int], None] | None = None,
    alive: Callable[[], object] = lambda: None,
) -> DataSet:
    """Find and index the data that `config` names, and stage it where that is wanted; DataError if it is not sound.

    Each folder is scanned, and copied, once a node.

    Args:
        progress: called with (headers read, of all); without it staging says nothing either.
        alive: called as staging gets on; what it raises ends it, and the next start goes on from there.
    """
    data = config.data
    if data.source == "synthetic":
        names = tuple(f"class{i}" for i in range(data.synthetic_classes))
        return DataSet(None, None, data.synthetic_samples, names, "synthetic")
    _decoder_type(data.source)  # so that what is missing shows before the hours that reading headers and copying take

    def scan() -> tuple[Index, Index | None]:
        train = open_split(data.root, (data.train,), progress)
        val = None
        if config.loop.eval_every:
            val = open_split(data.root, (data.val,) if data.val else VALIDATION_NAMES, progress)
            check_same_classes(train, val)
        if data.stage_to is not None:
            wanted = [index for index in (train, val) if index is not None]
            say = pace() if progress else None

            def staged(*state: Any) -> None:
                alive()
                if say:
                    say(*state)

            train, *rest = stage(wanted, data.stage_to, data.stage_reserve_gb * 1e9, staged)
            val = rest[0] if rest else None
        return train, val

    train, val = world.first_on_node(scan)
    return DataSet(train, val, len(train), train.classes, train.digest)


def open_validation(config: Config, world: World) -> Index:
    """The evaluation images alone; DataError if they are not sound."""
    if config.data.source == "synthetic":
        raise DataError("data.source=synthetic has nothing to evaluate: use data.source=dali or torchvision")
    _decoder_type(config.data.source)
    names = (config.data.val,) if config.data.val else VALIDATION_NAMES
    return world.first_on_node(lambda: open_split(config.data.root, names))


class TrainingBatches:
    """This rank's forward batches (`plan.accumulation` of them a step), endless, beginning with step `first_step`."""

    def __init__(
        self,
        config: Config,
        data: DataSet,
        plan: Plan,
        world: World,
        first_step: int,
        data_step: Callable[[int], int] = lambda step: step,
    ) -> None:
        """As the class says.

        Args:
            data_step: from a step to the step whose images it takes, where some were left out.
        """
        self.salvage: Salvage | None = None  # None: synthetic
        if data.train is None:
            self._batches = _synthetic(config, plan, world, len(data.classes))
            return
        self.salvage = Salvage(config.data, data.train)
        feed = TrainingFeed(config, data.train, plan, self.salvage, world.rank, lambda n: data_step(first_step + n))
        self._batches = _decoder(config, world, feed, plan.batch, self.salvage).batches()

    @classmethod
    def decoded_alone(cls, config: Config, data: DataSet, plan: Plan, world: World) -> Iterator[object]:
        """The same images from step 0, decoded and nothing else: the limit of the rest. DataError without DALI."""
        if config.data.source != "dali":
            raise DataError(f"data.source={config.data.source} has no decoding of its own: use data.source=dali")
        assert data.train is not None
        salvage = Salvage(config.data, data.train)
        feed = TrainingFeed(config, data.train, plan, salvage, world.rank, lambda step: step)
        return _decoder(config, world, feed, plan.batch, salvage).alone()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)


class EvaluationBatches:
    """This rank's share of the evaluation images, every image on exactly one rank; iterate it as often as needed."""

    def __init__(self, config: Config, index: Index, world: World, batch: int) -> None:
        self._config, self._index, self._world, self._batch = config, index, world, batch
        self.salvage = Salvage(config.data, index)
        self._decoder = None

    def __len__(self) -> int:
        """Images in the whole set, over all ranks."""
        return len(self._index)

    @property
    def left_out(self) -> int:
        """Images of this rank's share that cannot be decoded and are not among the batches."""
        return len(self.salvage.bad)

    @property
    def common(self) -> int:
        """Batches that every rank has; some have one more."""
        return -(-(len(self._index) // self._world.size) // self._batch)

    def with_rows(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The batches as (images, labels, rows of the index); all on the device, rows int64 (n,)."""
        begin, end = self._share
        for images, labels in self:
            # In their order, without those that proved to be bad by now.
            candidates = np.arange(begin, min(end, begin + len(labels) + len(self.salvage.bad)))
            rows = self.salvage.sound(candidates)[: len(labels)]
            begin = int(rows[-1]) + 1
            yield images, labels, torch.from_numpy(rows).to(labels.device, non_blocking=True)

    @property
    def _share(self) -> tuple[int, int]:
        """The first row of this rank and the one after its last."""
        n, world = len(self._index), self._world
        return n * world.rank // world.size, n * (world.rank + 1) // world.size

    def __iter__(self) -> Iterator[Batch]:
        rows = np.arange(*self._share)
        feed = EvaluationFeed(self._config.data, self._index, self.salvage, rows, self._batch)
        if self._decoder is None:
            self._decoder = _decoder(self._config, self._world, feed, self._batch, self.salvage)
        return self._decoder.batches(feed)


def _decoder(config: Config, world: World, feed: TrainingFeed | EvaluationFeed, batch: int, salvage: Salvage):
    return _decoder_type(config.data.source)(config, world, feed, batch, salvage)


def _decoder_type(source: str) -> type:
    """The decoder of a source, imported where it is wanted; DataError where DALI is and cannot be."""
    if source == "torchvision":
        from trainer.data.pil import Decoder

        return Decoder
    try:
        from trainer.data.decoder import Decoder
    except ImportError as error:
        raise DataError(
            f"data.source=dali needs NVIDIA DALI, which cannot be imported here ({error}): "
            "install nvidia-dali-cuda130, or use data.source=torchvision"
        ) from error
    return Decoder


def _synthetic(config: Config, plan: Plan, world: World, classes: int) -> Iterator[Batch]:
    """The same random batch for ever, already on the device: what is left is the speed of the training step."""
    size = config.data.image_size
    generator = torch.Generator().manual_seed(config.seed + world.rank)
    images = torch.randn(plan.batch, 3, size, size, generator=generator, dtype=torch.float32)
    images = images.to(world.device, pixel_dtype(config, world.device), memory_format=torch.channels_last)
    labels = torch.randint(classes, (plan.batch,), generator=generator).to(world.device)
    while True:
        yield images, labels
