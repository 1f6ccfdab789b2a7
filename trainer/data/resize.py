"""PIL's bilinear resize of decoded images on the CPU, by torch's vectorised uint8 code.

DALI's own resize of a CPU image works in float, its horizontal pass a pixel at a time: 990 us of one core for the mean
training window of ImageNet's originals, this takes 190 (benchmarks/README.md). It differs from PIL by at most one grey
level, 0.03 on average.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from trainer.signals import STOP_SIGNALS


class Resizer:
    """Resizes batches in threads of its own, while the caller prepares the next one."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "resize", initializer=_alone)

    def begin(self, images: Sequence[torch.Tensor], into: Sequence[torch.Tensor]) -> list[Future]:
        """Begin to resize each image, uint8 (h, w, 3), to the shape of what it is to fill; wait for the futures."""
        return self.share(lambda number: resize(images[number], into[number]), len(images))

    def share(self, work: Callable[[int], None], count: int) -> list[Future]:
        """Begin work(number) for each of `count` numbers, in the threads; wait for the futures."""
        shares = (range(first, count, self._threads) for first in range(self._threads))
        return [self._pool.submit(_each, work, share) for share in shares]


def _alone() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # they are for the main thread
    torch.set_num_threads(1)  # torch counts by calling thread: each of these would start a team of its own


@torch.inference_mode()  # an evaluation's tensors may be filled in it alone, and a thread has a mode of its own
def _each(work: Callable[[int], None], numbers: Iterable[int]) -> None:
    for number in numbers:
        work(number)


def resize(image: torch.Tensor, out: torch.Tensor) -> None:
    """Fill `out` with `image`, both uint8 (h, w, 3)."""
    # What interpolate(mode="bilinear", antialias=True) calls, which takes no output: 190 us instead of 260.
    torch.ops.aten._upsample_bilinear2d_aa.out(
        image.permute(2, 0, 1)[None], out.shape[:2], False, None, None, out=out.permute(2, 0, 1)[None]
    )
