"""DALI on a feed: chunks to batches, ahead of need, and on after an image that cannot be decoded."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import numpy as np
import torch

from trainer import memory
from trainer.config import Config
from trainer.data import dali, ops
from trainer.data.feeds import Batch, Chunk, Feed, pixel_dtype
from trainer.data.salvage import Salvage
from trainer.data.table import DataError
from trainer.distributed import World
from trainer.signals import held

AHEAD = 4  # batches; a guess, not measured on a GPU: each takes memory, and with too few the GPU waits


class Decoder:
    """A DALI pipeline and the feed it is on."""

    def __init__(self, config: Config, world: World, feed: Feed, batch: int, salvage: Salvage) -> None:
        """On `feed`, whose chunks hold at most `batch` images."""
        data = config.data
        on_gpu = world.device.type == "cuda"
        if data.decoder == "gpu" and not on_gpu:
            raise DataError("data.decoder=gpu needs a GPU to train on: use data.decoder=auto, or device=cuda")
        self._feed, self._salvage = feed, salvage
        self._graph = dali.Graph(
            mode=feed.mode,
            max_batch=batch,
            threads=data.threads or min(world.cores, 8),
            prefetch=data.prefetch,
            mean=tuple(data.mean),
            std=tuple(data.std),
            device_id=world.device.index if on_gpu else None,
            decode_on_gpu=on_gpu and data.decoder != "cpu",
            hw_decoder_load=data.hw_decoder_load,
            decode_pixels=data.decode_pixels,
            half=pixel_dtype(config, world.device) == torch.float16,
            encoded=bool(feed.index.shard_files),
            steps=ops.steps(feed.augment) if feed.augment is not None else ops.Steps(),
        )
        self._next = 0  # the feed's chunk that DALI asks for next
        # Number and rows of the chunks that DALI has and we have not; a chunk may have other rows by now, since other
        # ranks tell at an epoch's end what they have found to be bad.
        self._ahead: deque[tuple[int, np.ndarray]] = deque()
        self._in_use = InUse(partial(_now, world.device)) if on_gpu else None
        self._build()

    def batches(self, feed: Feed | None = None) -> Iterator[Batch]:
        """Decode until the feed ends, then make ready for the next one.

        On a GPU, what reads a batch must be queued, on the current stream, before the next one is asked for.
        """
        self._feed = feed or self._feed
        while True:
            try:
                batch = dali.run(self._pipeline)
            except StopIteration:
                dali.reset(self._pipeline)
                self._next = 0
                return
            except RuntimeError as error:
                self._recover(error)
                continue
            self._ahead.popleft()
            yield batch
            if self._in_use is not None:
                self._in_use.hold(batch)

    def alone(self) -> Iterator[object]:
        """The batches only decoded, for the clock: before any other use of this object, and for ever after it."""
        with held():
            self._pipeline = dali.decode_only(self._graph, self._source)
        while True:
            yield self._pipeline.batch()
            self._ahead.clear()

    def _build(self) -> None:
        with held():  # DALI's threads
            self._pipeline = dali.build(self._graph, self._source)

    def _source(self) -> tuple:
        """The next chunk in the form that the graph takes; see dali.Graph."""
        while True:
            chunk = self._feed.chunk(self._next)
            self._next += 1
            if len(chunk.rows):
                break
        self._ahead.append((self._next - 1, chunk.rows))
        labels = self._feed.index.labels[chunk.rows].astype(np.int64)
        return self._files(chunk.rows), labels, *self._arguments(chunk)

    def _files(self, rows: np.ndarray) -> list[np.ndarray]:
        """For each row its file's bytes or, where the graph reads files itself, those of its path."""
        index, converted = self._feed.index, self._salvage.converted
        if index.shard_files:
            files = index.encoded(rows)
        else:
            files = [np.frombuffer(os.fsencode(path), np.uint8) for path in index.paths(rows)]
        return [converted.get(row, file) for row, file in zip(rows.tolist(), files)] if converted else files

    def _arguments(self, chunk: Chunk) -> tuple[np.ndarray, ...]:
        windows, steps = chunk.windows, self._graph.steps
        sides = np.full((len(chunk.rows), 2), chunk.size, np.float32 if self._graph.mode == "resized" else np.int32)
        fed = (windows.flip.astype(np.int32), np.stack([windows.y, windows.x], axis=1), sides)
        if self._graph.mode == "resized":
            fed = (*fed, np.stack([windows.height, windows.width], axis=1))
        elif chunk.shapes is not None:
            fed = (*fed, chunk.shapes.astype(np.float32))
        if steps.inputs:
            fed = (*fed, *ops.feed(steps, chunk.recipes, windows.flip, chunk.size))
        return fed

    def _recover(self, error: RuntimeError) -> None:
        """Deal with what DALI stumbled over and go back to it in a new pipeline: a failed one may not go on.

        Raises what `Salvage.take` raises, and `error` itself where every image in flight can be decoded.
        """
        rows = np.concatenate([np.empty(0, np.int64), *(rows for _, rows in self._ahead)])
        refused = dali.refused(self._files(rows), self._graph)
        if len(refused) == len(rows) and memory.ran_out(error):
            raise error  # no image's fault: one that is too large alone would be refused alone
        if not refused:
            self._salvage.demand_unchanged(rows)
            raise error
        for number in refused:
            self._salvage.take(int(rows[number]))
        self._next, _ = self._ahead[0]
        self._ahead.clear()
        self._build()


class Moment(Protocol):
    """A point in a GPU's queue."""

    def query(self) -> bool:
        """Whether the GPU has come to it."""

    def synchronize(self) -> None:
        """Wait until it has."""


class InUse:
    """Batches that kernels in a GPU's queue may yet read.

    A host that waits for nothing runs steps ahead of its GPU. When a batch is let go here, the step that reads it may
    not have begun there, and DALI, whose streams know nothing of torch's, fills memory that nobody holds anew.
    """

    def __init__(self, now: Callable[[], Moment]) -> None:
        """`now` marks the end of what is queued."""
        self._now = now
        self._held: deque[tuple[Moment, Batch]] = deque()

    def hold(self, batch: Batch) -> None:
        """Hold a batch until what is queued by now is done; waits where the host is AHEAD batches ahead."""
        self._held.append((self._now(), batch))
        while self._held and (len(self._held) > AHEAD or self._held[0][0].query()):
            self._held[0][0].synchronize()
            self._held.popleft()


def _now(device: torch.device) -> Moment:
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
