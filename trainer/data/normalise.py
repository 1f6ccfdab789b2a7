"""Decoded images to a normalised batch on the CPU: resize, crop, flip and normalise, an image at a time, in its cache.

DALI's `crop_mirror_normalize` is fed a copy and takes longer (benchmarks/README.md). The values are the same to a
rounding of float32.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import torch

from trainer.data.resize import Resizer, resize


class Normaliser:
    """Finishes batches in threads of its own, while the caller prepares the next one."""

    def __init__(self, threads: int, mean: Sequence[float], std: Sequence[float]) -> None:
        """As the class says; `mean` and `std` of each channel in units of [0, 1]."""
        self._resizer = Resizer(threads)
        mean, std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self._scale, self._shift = 1 / (255 * std), -mean / std
        self._batches, self._own = _Batches(), threading.local()

    def begin(
        self, images: Sequence[torch.Tensor], shapes: np.ndarray, starts: np.ndarray, side: int, flips: np.ndarray
    ) -> tuple[list[Future], torch.Tensor]:
        """Begin a batch; wait for the futures before using it.

        Args:
            images: uint8 (h, w, 3) each.
            shapes: height and width of each after its resize, (n, 2).
            starts: upper left corner (y, x) of what is cut out of each after that, (n, 2); black outside the image.
            side: of the squares that are cut out, in pixels.
            flips: which of them are mirrored, (n,).

        Returns:
            float32 (n, side, side, 3), whose memory is used again once no tensor shares it.
        """
        out = self._batches.take((len(images), side, side, 3))
        # A row at a time: torch is fast along a long last dimension, slow along one of three.
        scale, shift = (row.float().repeat(side) for row in (self._scale, self._shift))

        def finish(number: int) -> None:
            resized = self._room(*map(int, shapes[number]))
            resize(images[number], resized)
            cropped = _cropped(resized, *map(int, starts[number]), side)
            rows = out[number].view(side, -1)
            rows.copy_((cropped.flip(1) if flips[number] else cropped).reshape(side, -1))
            torch.addcmul(shift, rows, scale, out=rows)

        return self._resizer.share(finish, len(images)), out

    def _room(self, height: int, width: int) -> torch.Tensor:
        """This thread's buffer for a resized image."""
        need = height * width * 3
        buffer = getattr(self._own, "buffer", None)
        if buffer is None or len(buffer) < need:
            buffer = self._own.buffer = torch.empty(need, dtype=torch.uint8)
        return buffer[:need].view(height, width, 3)


def _cropped(image: torch.Tensor, top: int, left: int, side: int) -> torch.Tensor:
    height, width, _ = image.shape
    if min(top, left) >= 0 and top + side <= height and left + side <= width:
        return image[top : top + side, left : left + side]
    out = image.new_zeros(side, side, 3)
    y, x = max(-top, 0), max(-left, 0)
    inside = image[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)]
    out[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return out


class _Batches:
    """Memory for batches: fresh pages for each would cost more than what is written to them."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """float32 of this shape, its values whatever they were."""
        need = int(np.prod(shape))
        memory = next((self._free.pop(i) for i, m in enumerate(self._free) if m.size >= need), None)
        if memory is None:
            self._free.clear()  # those of smaller images
            memory = np.empty(need, np.float32)
        view = memory[:need].reshape(shape)
        weakref.finalize(view, self._free.append, memory).atexit = False
        return torch.from_numpy(view)
