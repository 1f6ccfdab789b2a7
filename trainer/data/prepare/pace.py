"""How far `prepare` and `inspect` are: lines with rate and time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import IO

# (what is done, part done, the whole, images so far); the parts are in units of the caller's choice, the images not
Progress = Callable[[str, int, int, int], None]


def pace(every: float = 2.0, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic) -> Progress:
    """A Progress that says a line every so many seconds, and nothing of what is done sooner.

    Rates count from the first call for a thing on, so that what an earlier run did makes no one faster.
    """
    doing, begun, last = "", (0.0, 0, 0), 0.0

    def count(what: str, done: int, total: int, images: int) -> None:
        nonlocal doing, begun, last
        now = clock()
        if what != doing:
            doing, begun, last = what, (now, done, images), now
        since, gone = now - begun[0], done - begun[1]
        if now - last < every or not gone:
            return
        last = now
        rate, left = (images - begun[2]) / since, since / gone * (total - done)
        text = f"{what}: {100 * done / total:.1f} %, {images:,} images, {rate:,.0f} images/s, {span(left)} left"
        print(text, file=stream or sys.stderr, flush=True)

    return count


def span(seconds: float) -> str:
    """A time in words: 42 s, 12 min, 3 h 05 min."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
