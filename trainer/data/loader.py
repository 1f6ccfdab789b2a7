"""Batches for this rank, from any position on.

A training loader begins at a step and never ends: it decodes on into the next epoch while the last one is evaluated.
What a batch holds is a function of (seed, position) alone, so resuming costs nothing but that integer.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch

from trainer.config import Augment, Config, Data
from trainer.data import policies
from trainer.data.augment import evaluation_windows, training_draws, training_windows
from trainer.data.index import check_same_classes, open_split
from trainer.data.order import Order
from trainer.data.table import DataError, Index
from trainer.distributed import World
from trainer.plan import Plan
from trainer.signals import held

VALIDATION_NAMES = ("val", "validation", "test")
Batch = tuple[torch.Tensor, torch.Tensor]  # images (n, 3, size, size) in channels-last memory, labels int64 (n,)


class UndecodableError(DataError):
    """An image that cannot be decoded, met in mid-run by one rank."""

    everywhere = False


@dataclass(frozen=True)
class DataSet:
    """The rows to train on and to evaluate on; `val` is None where nothing is evaluated."""

    train: Index | None  # None: synthetic
    val: Index | None
    samples: int
    classes: tuple[str, ...]
    digest: str  # of the training rows


def open_data(config: Config, world: World, progress: Callable[[int, int], None] | None = None) -> DataSet:
    """Find and index the data that `config` names, scanning each folder once a node; DataError if it is not sound."""
    data = config.data
    if data.source == "synthetic":
        names = tuple(f"class{i}" for i in range(data.synthetic_classes))
        return DataSet(None, None, data.synthetic_samples, names, "synthetic")

    def scan() -> tuple[Index, Index | None]:
        train = open_split(data.root, (data.train,), progress)
        if not config.loop.eval_every:
            return train, None
        val = open_split(data.root, (data.val,) if data.val else VALIDATION_NAMES, progress)
        check_same_classes(train, val)
        return train, val

    train, val = world.first_on_node(scan)
    return DataSet(train, val, len(train), train.classes, train.digest)


def open_validation(config: Config, world: World) -> Index:
    """The evaluation images alone; DataError if they are not sound."""
    if config.data.source == "synthetic":
        raise DataError("data.source=synthetic has nothing to evaluate: use data.source=dali")

    names = (config.data.val,) if config.data.val else VALIDATION_NAMES
    return world.first_on_node(lambda: open_split(config.data.root, names))


def training_batches(
    config: Config,
    data: DataSet,
    plan: Plan,
    world: World,
    first_step: int,
    data_step: Callable[[int], int] = lambda step: step,
) -> Iterator[Batch]:
    """This rank's forward batches (`plan.accumulation` of them a step), endless, beginning with step `first_step`.

    Args:
        data_step: from a step to the step whose images it takes, where some were left out.
    """
    if data.train is None:
        return _synthetic(config, plan, world)
    order = Order(config.seed, plan.samples)
    share = plan.batch * plan.accumulation

    def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for step in count(first_step):
            first = data_step(step) * plan.global_batch + world.rank * share
            for start in range(first, first + share, plan.batch):
                yield order.at(start, plan.batch)

    feed = _TrainingFeed(config, data.train, chunks())
    return _Decoder(config, world, feed, plan.batch).batches()


class EvaluationBatches:
    """This rank's share of the evaluation images, every image on exactly one rank; iterate it as often as needed."""

    def __init__(self, config: Config, index: Index, world: World, batch: int) -> None:
        self._config, self._index, self._world, self._batch = config, index, world, batch
        self._decoder: _Decoder | None = None

    def __len__(self) -> int:
        """Images in the whole set, over all ranks."""
        return len(self._index)

    @property
    def common(self) -> int:
        """Batches that every rank has; some have one more."""
        return -(-(len(self._index) // self._world.size) // self._batch)

    def __iter__(self) -> Iterator[Batch]:
        n, world = len(self._index), self._world
        rows = np.arange(n * world.rank // world.size, n * (world.rank + 1) // world.size)
        feed = _EvaluationFeed(self._config.data, self._index, rows, self._batch)
        if self._decoder is None:
            self._decoder = _Decoder(self._config, world, feed, self._batch)
        return self._decoder.batches(feed)


class _TrainingFeed:
    """What DALI is to decode next, for training."""

    def __init__(self, config: Config, index: Index, chunks: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
        self.mode = "resized" if config.augment.crop == "resized" else "padded"
        self.size = config.data.image_size
        self.index = index
        self._augment: Augment = config.augment
        self._seed, self._chunks = config.seed, chunks
        from trainer.data import ops  # as below: without DALI, synthetic data still works

        self._ops, self.steps = ops, ops.steps(config.augment)

    def next(self) -> tuple[np.ndarray, tuple]:
        """(rows, what the graph's mode asks for); StopIteration at the end."""
        epochs, rows = next(self._chunks)
        draws = training_draws(self._seed, epochs, rows)
        windows = training_windows(self._augment, self.size, draws, self.index.widths[rows], self.index.heights[rows])
        fed = (windows.flip.astype(np.int32), np.stack([windows.y, windows.x], axis=1))
        if self.mode == "resized":
            fed = (*fed, np.stack([windows.height, windows.width], axis=1))
        if self.steps.inputs:
            recipes = policies.draw(self._augment, self.size, self._seed, epochs, rows)
            fed = (*fed, *self._ops.feed(self.steps, recipes, windows.flip, self.size))
        return rows, fed


class _EvaluationFeed:
    """What DALI is to decode next, for evaluation: rows in order, the last batch shorter."""

    mode = "center"

    def __init__(self, data: Data, index: Index, rows: np.ndarray, batch: int) -> None:
        self.size, self.index = data.crop_size, index
        self._short_side = data.short_side
        self._chunks = (rows[i : i + batch] for i in range(0, len(rows), batch))

    def next(self) -> tuple[np.ndarray, tuple]:
        rows = next(self._chunks)
        width, height, windows = evaluation_windows(
            self._short_side, self.size, self.index.widths[rows], self.index.heights[rows]
        )
        starts = np.stack([windows.y, windows.x], axis=1)
        return rows, (windows.flip.astype(np.int32), starts, np.stack([height, width], axis=1).astype(np.float32))


class _Decoder:
    """A DALI pipeline and the feed it is on."""

    def __init__(self, config: Config, world: World, feed: _TrainingFeed | _EvaluationFeed, batch: int) -> None:
        from trainer.data import dali  # the only place that needs it: synthetic data and tests run without

        self._dali = dali
        data = config.data
        on_gpu = world.device.type == "cuda"
        if data.decoder == "gpu" and not on_gpu:
            raise DataError("data.decoder=gpu needs a GPU to train on: use data.decoder=auto, or device=cuda")
        self._feed = feed
        self._graph = dali.Graph(
            mode=feed.mode,
            size=feed.size,
            max_batch=batch,
            threads=data.threads or min(world.cores, 8),
            prefetch=data.prefetch,
            mean=tuple(data.mean),
            std=tuple(data.std),
            device_id=world.device.index if on_gpu else None,
            decode_on_gpu=on_gpu and data.decoder != "cpu",
            half=on_gpu and config.precision.amp != "fp32",
            encoded=bool(feed.index.shard_files),
            **({"steps": feed.steps} if isinstance(feed, _TrainingFeed) else {}),
        )
        self._ahead: deque[np.ndarray] = deque()  # rows that DALI has and we have not, to name a bad file
        with held():  # DALI's threads
            self._pipeline = dali.build(self._graph, self._source)

    def batches(self, feed: _TrainingFeed | _EvaluationFeed | None = None) -> Iterator[Batch]:
        """Decode until the feed ends, then make ready for the next one."""
        self._feed = feed or self._feed
        while True:
            try:
                batch = self._dali.run(self._pipeline)
            except StopIteration:
                self._dali.reset(self._pipeline)
                return
            except RuntimeError as error:
                raise self._blame(error) from error
            self._ahead.popleft()
            yield batch

    def _source(self) -> tuple:
        rows, fed = self._feed.next()
        self._ahead.append(rows)
        index = self._feed.index
        if index.shard_files:
            files = index.encoded(rows)
        else:
            files = [np.frombuffer(os.fsencode(path), np.uint8) for path in index.paths(rows)]
        return files, index.labels[rows].astype(np.int64), *fed

    def _blame(self, error: RuntimeError) -> Exception:
        """The error that names the file. DALI says only which sample of some batch in flight it was."""
        index = self._feed.index
        for row in np.concatenate(list(self._ahead) or [np.empty(0, np.int64)]):
            reason = self._why_undecodable(row)
            if reason:
                place = f"{index.path(row)} (row {row}, class {index.classes[index.labels[row]]})"
                return UndecodableError(f"{place} {reason}: put a sound copy in its place, then run again")
        return error

    def _why_undecodable(self, row: int) -> str:
        """Why DALI cannot decode this row, in words that follow its name; empty if it can."""
        index = self._feed.index
        try:
            data = index.encoded(np.array([row]))[0] if index.shard_files else np.fromfile(index.path(row), np.uint8)
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if not len(data):
            return "is empty"
        return "" if self._dali.decodes(data, self._graph) else "cannot be decoded: it is damaged or not an image"


def _synthetic(config: Config, plan: Plan, world: World) -> Iterator[Batch]:
    """The same random batch for ever, already on the device: what is left is the speed of the training step."""
    size = config.data.image_size
    generator = torch.Generator().manual_seed(config.seed + world.rank)
    half = world.device.type == "cuda" and config.precision.amp != "fp32"
    images = torch.randn(plan.batch, 3, size, size, generator=generator, dtype=torch.float32)
    images = images.to(world.device, torch.float16 if half else torch.float32, memory_format=torch.channels_last)
    labels = torch.randint(config.data.synthetic_classes, (plan.batch,), generator=generator).to(world.device)
    while True:
        yield images, labels
