"""How fast training goes: steps only, without warm-up, evaluation and saving."""

from __future__ import annotations

import time
from collections.abc import Callable

from trainer.balance import WARM_UP_STEPS


class Stopwatch:
    """Times the steps of a run. `skip()` keeps whatever happened since the last step out of the count."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last = clock()
        self._warm = 0
        self._skipped = False
        self._whole = [0, 0.0, 0.0]  # images, seconds, of which waiting for data
        self._window = [0, 0.0, 0.0]

    def step(self, images: int, data_seconds: float) -> None:
        """A step over `images` (of all ranks) has ended."""
        now = self._clock()
        seconds, self._last = now - self._last, now
        self._warm += 1
        if self._warm > WARM_UP_STEPS and not self._skipped:
            for count in (self._whole, self._window):
                count[0] += images
                count[1] += seconds
                count[2] += data_seconds
        self._skipped = False

    def skip(self) -> None:
        """What took place since the last step, and the step it delayed, do not count."""
        self._skipped = True

    def window(self) -> tuple[float | None, float | None]:
        """(images/s, share of the time spent waiting for data) since the last call; None where nothing counted."""
        rates = self._rates(self._window)
        self._window = [0, 0.0, 0.0]
        return rates

    def whole(self) -> tuple[float | None, float | None]:
        """The same since the start."""
        return self._rates(self._whole)

    @staticmethod
    def _rates(count: list) -> tuple[float | None, float | None]:
        images, seconds, waited = count
        return (images / seconds, waited / seconds) if seconds > 0 else (None, None)
