"""Pillow and torchvision on a feed: what trainer/data/decoder.py does with DALI, in processes.

For machines without DALI, and the yardstick for its pixels: a chunk is cut, resized, flipped and augmented by the
functions that torchvision's transforms call, in their order. On the 300 real ImageNet files at 224 px it made 287
images per CPU second where DALI made 496, with RandAugment 256 and 361; besides, the rank takes a CPU second for every
1,500 images that it fetches from the processes.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count, islice
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from trainer.config import Config, RunError
from trainer.data import pil_ops
from trainer.data.feeds import Batch, Chunk, Feed, pixel_dtype
from trainer.data.policies import Recipes
from trainer.data.prepare import in_order, worker_pool
from trainer.data.salvage import Salvage
from trainer.distributed import World

# What holds an encoded image: (path, where it begins, bytes, -1 for all), or the bytes themselves.
File = tuple[str, int, int] | np.ndarray


class WorkerLostError(RunError):
    """A decoding process has been killed."""

    everywhere = False


@dataclass(frozen=True, kw_only=True)
class Job:
    """m images of one chunk, for one process."""

    files: list[File]
    stored: np.ndarray  # width and height in the index, (m, 2)
    windows: np.ndarray  # x, y, width, height, (m, 4)
    flips: np.ndarray  # bool (m,)
    size: int  # side of what comes out
    shapes: np.ndarray | None  # height and width of the whole image after its resize, (m, 2)
    recipes: Recipes | None
    fill: int = 0
    bilinear: bool = False


@dataclass(frozen=True)
class Done:
    """The pixels of a job, uint8 (m, size, size, 3), and the places of the images that could not be decoded."""

    pixels: np.ndarray
    failed: list[int] = field(default_factory=list)


def decode(job: Job) -> Done:
    """Do a job; an image that cannot be decoded, or has not the stored size, is black and named."""
    done = Done(np.zeros((len(job.files), job.size, job.size, 3), np.uint8))
    for place in range(len(job.files)):
        try:
            done.pixels[place] = _one(job, place)
        except Exception:  # Pillow's plugins raise OSError, SyntaxError, struct.error and more on broken files
            done.failed.append(place)
    return done


class Decoder:
    """Decoding processes and the feed they are on; the same interface as that of DALI's Decoder."""

    def __init__(self, config: Config, world: World, feed: Feed, batch: int, salvage: Salvage) -> None:
        data = config.data
        self._feed, self._salvage, self._world = feed, salvage, world
        self._workers = min(data.threads or min(world.cores, 8), batch)
        self._ahead = data.prefetch * self._workers
        self._pool = worker_pool(self._workers, preload=__name__, initializer=_alone)
        self._dtype = pixel_dtype(config, world.device)
        levels = [255 * torch.tensor(values).view(1, 3, 1, 1) for values in (data.mean, data.std)]
        self._mean, self._std = (level.to(world.device) for level in levels)

    def batches(self, feed: Feed | None = None) -> Iterator[Batch]:
        """Decode until the feed ends."""
        feed = self._feed = feed or self._feed
        begun: deque[tuple[int, Chunk, int]] = deque()  # (number, chunk, jobs) that are under way

        def jobs() -> Iterator[Job]:
            for number in count():
                try:
                    chunk = feed.chunk(number)
                except StopIteration:
                    return
                parts = np.array_split(np.arange(len(chunk.rows)), min(self._workers, len(chunk.rows)) or 1)
                begun.append((number, chunk, len(parts)))
                yield from (self._job(chunk, part) for part in parts)

        results = in_order(self._pool, decode, jobs(), self._ahead)
        try:
            for first in results:
                number, chunk, parts = begun.popleft()
                done = [first, *islice(results, parts - 1)]
                if any(part.failed for part in done):
                    chunk, done = self._recover(number, chunk)
                if len(chunk.rows):
                    yield self._batch(chunk, [part.pixels for part in done])
        except BrokenProcessPool:
            raise WorkerLostError(
                f"a decoding process of rank {self._world.rank} was killed, most often for want of memory: lower "
                "data.threads or data.prefetch; the same command goes on from the last save"
            ) from None

    def _job(self, chunk: Chunk, part: np.ndarray) -> Job:
        index, windows, recipes, augment = self._feed.index, chunk.windows, chunk.recipes, self._feed.augment
        rows = chunk.rows[part]
        columns = windows.x, windows.y, windows.width, windows.height
        if recipes is not None:
            recipes = Recipes(recipes.ops[part], recipes.magnitudes[part], recipes.boxes[part])
        return Job(
            files=self._files(rows),
            stored=np.stack([index.widths[rows], index.heights[rows]], axis=1),
            windows=np.stack(columns, axis=1)[part],
            flips=windows.flip[part],
            size=chunk.size,
            shapes=None if chunk.shapes is None else chunk.shapes[part],
            recipes=recipes,
            **({} if augment is None else {"fill": augment.fill, "bilinear": augment.interpolation == "bilinear"}),
        )

    def _files(self, rows: np.ndarray) -> list[File]:
        index, converted = self._feed.index, self._salvage.converted
        if index.shard_files:
            paths = [str(index.root / index.shard_files[number]) for number in index.shards[rows]]
            files: list[File] = list(zip(paths, index.positions[rows].tolist(), index.sizes[rows].tolist()))
            return [converted.get(row, file) for row, file in zip(rows.tolist(), files)]
        copies = {row: os.fsdecode(converted[row].tobytes()) for row in rows.tolist() if row in converted}
        return [(copies.get(row, path), 0, -1) for row, path in zip(rows.tolist(), index.paths(rows))]

    def _recover(self, number: int, chunk: Chunk) -> tuple[Chunk, list[Done]]:
        """The chunk without what cannot be decoded, and that decoded; raises what `Salvage.take` raises."""
        while True:
            job = self._job(chunk, np.arange(len(chunk.rows)))
            done = decode(job)
            if not done.failed:
                return chunk, [done]
            for place in done.failed:
                row = int(chunk.rows[place])
                if row in self._salvage.converted:  # Pillow can decode it: something else is wrong
                    self._salvage.demand_unchanged(np.array([row]))
                    _one(job, place)
                self._salvage.take(row)
            chunk = self._feed.chunk(number)

    def _batch(self, chunk: Chunk, parts: list[np.ndarray]) -> Batch:
        device = self._world.device
        # Pinned for a GPU: a copy from any other memory keeps the host until the GPU has come to it.
        pixels = torch.empty(
            len(chunk.rows), chunk.size, chunk.size, 3, dtype=torch.uint8, pin_memory=device.type == "cuda"
        )
        np.concatenate(parts, out=pixels.numpy())
        images = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).float()
        images = images.sub_(self._mean).div_(self._std)
        if chunk.recipes is not None:
            # After normalising, as in trainer/data/ops.py: what is erased becomes the mean colour, which is a zero.
            for image, (y, x, height, width) in zip(images, chunk.recipes.boxes.tolist()):
                image[:, y : y + height, x : x + width] = 0
        labels = torch.from_numpy(self._feed.index.labels[chunk.rows].astype(np.int64))
        return images.to(self._dtype), labels.to(device)


def _alone() -> None:
    torch.set_num_threads(1)  # the processes are as many as the cores


def _one(job: Job, place: int) -> np.ndarray:
    with Image.open(io.BytesIO(_content(job.files[place]))) as opened:
        if opened.size != tuple(job.stored[place]):
            raise ValueError("another image than the one that was indexed")
        image = opened.convert("RGB")
    if job.shapes is not None:
        height, width = job.shapes[place].tolist()
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    x, y, width, height = job.windows[place].tolist()
    image = image.crop((x, y, x + width, y + height))  # black where that is outside
    image = image.resize((job.size, job.size), Image.Resampling.BILINEAR)
    if job.flips[place]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if job.recipes is not None:
        for op, magnitude in zip(job.recipes.ops[place], job.recipes.magnitudes[place]):
            image = pil_ops.apply(image, op, magnitude, job.fill, job.bilinear)
    return np.asarray(image)


def _content(file: File) -> bytes | np.ndarray:
    if isinstance(file, np.ndarray):
        return file
    path, begin, size = file
    if size < 0:
        with open(path, "rb") as whole:
            return whole.read()
    return os.pread(_shard(path).fileno(), size, begin)


@lru_cache(maxsize=64)
def _shard(path: str) -> BinaryIO:
    return open(path, "rb")
