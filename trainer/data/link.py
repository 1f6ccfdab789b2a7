"""Between the decoding of a CPU's batches and what follows it: the resize in threads of our own, a batch ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from trainer.data.normalise import Normaliser
from trainer.data.resize import Resizer

Feed = tuple[list[np.ndarray] | np.ndarray, ...]


def to_decode(mode: str, files: list[np.ndarray], feed: Sequence[np.ndarray]) -> Feed:
    """What of a batch its decoder is given: the files, and the start and shape of each window where that is all."""
    return (files, feed[2], feed[4]) if mode == "resized" else (files,)


class Link:
    """From the decoding of a batch on the CPU to its resize, which runs a batch ahead, for DALI to finish."""

    def __init__(self, graph: Any, source: Callable[[], Feed]) -> None:
        """As the class says.

        Args:
            graph: a trainer.data.dali.Graph.
            source: as the graph wants it; what `decode` is fed is `named`, which asks it.
        """
        self._graph, self._source = graph, source
        self.decode: Any = None  # the pipeline, once there is one
        self._feeds: deque[Feed] = deque()  # what the batches in flight need after their decoding
        self._begun: deque[tuple] = deque()
        self._prepare()

    def next(self) -> tuple:
        """A batch that is ready, while the next one is being made; StopIteration after the last."""
        while len(self._begun) < 2:
            try:
                (decoded,) = self.decode.run()
            except StopIteration:
                break
            labels, *feed = self._feeds.popleft()
            # Not by torch.from_dlpack, which takes 25 us an image where this takes 2.
            images = [torch.from_numpy(np.asarray(decoded[i])) for i in range(len(labels))]
            self._begun.append(self._begin(images, labels, *feed))
        if not self._begun:
            raise StopIteration
        futures, *batch = self._begun.popleft()
        for future in futures:
            future.result()
        return tuple(batch)

    def named(self) -> Feed:
        """What the decoder is to decode."""
        files, *feed = self._source()
        self._feeds.append(tuple(feed))
        return to_decode(self._graph.mode, files, feed)

    def _prepare(self) -> None:
        self._resizer = Resizer(self._graph.threads)
        # The pipeline copies what it is fed. Fresh memory would be 2,400 new pages for a batch of 64.
        self._squares = deque(torch.empty(0, dtype=torch.uint8) for _ in range(2))

    def _begin(self, images: list[torch.Tensor], labels, flips, starts, sides, shapes, *inputs) -> tuple:
        """(futures to wait for, what `_finish` asks for)."""
        if self._graph.mode == "center":
            into = [torch.empty(*map(int, shape), 3, dtype=torch.uint8) for shape in shapes]
            feed = [image.numpy() for image in into], labels, flips, starts, sides, *inputs
        else:
            into = self._square(int(sides[0, 0]))[: len(images)]
            feed = into.numpy(), labels, flips, *inputs
        return self._resizer.begin(images, into), *feed

    def _square(self, side: int) -> torch.Tensor:
        """A buffer for a batch of images of this side: the one that was used before the last."""
        self._squares.rotate()
        shape = (self._graph.max_batch, side, side, 3)
        if self._squares[0].shape != shape:
            self._squares[0] = torch.empty(shape, dtype=torch.uint8)
        return self._squares[0]


class Normalising(Link):
    """From the decoding to the end, for a CPU and pixels that nothing else is done to: (images NHWC, labels)."""

    def _prepare(self) -> None:
        self._normaliser = Normaliser(self._graph.threads, self._graph.mean, self._graph.std)

    def _begin(self, images: list[torch.Tensor], labels, flips, starts, sides, shapes) -> tuple:
        if self._graph.mode == "resized":  # the window has been cut out before
            starts, shapes = np.zeros_like(shapes), sides
        futures, batch = self._normaliser.begin(images, shapes, starts, int(sides[0, 0]), flips)
        return futures, batch, torch.from_numpy(labels)
