"""Where each rank's time goes, by its own clock, so that the rank which holds up the others is known by name."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import mean, median_low
from typing import Any

import torch

from trainer.distributed import World
from trainer.exposed import Wait

WARM_UP_STEPS = 5  # kernels are chosen and buffers filled; never counted
COLUMNS = 3  # of a rank: seconds, of which waiting for images, of which waiting for gradients to be reduced


class Balance:
    """What this rank's steps took since the last `cut`. `pause()` leaves out whatever happens before the next step."""

    def __init__(self, here: World, clock: Callable[[], float] = time.perf_counter) -> None:
        self._here, self._clock = here, clock
        self._last, self._left_out = clock(), WARM_UP_STEPS
        self._open: deque[tuple[float, float, Sequence[Wait]]] = deque()

    def add(self, data_seconds: float, waits: Sequence[Wait]) -> None:
        """A step has ended."""
        now = self._clock()
        seconds, self._last = now - self._last, now
        if self._left_out:
            self._left_out -= 1
        elif self._here.size > 1:
            self._open.append((seconds, data_seconds, waits))

    def pause(self) -> None:
        self._left_out = max(self._left_out, 1)

    def cut(self) -> torch.Tensor:
        """float64 (ranks * COLUMNS,) on the device, 0 but in this rank's place, so that their sum is a table.

        A step whose work the device has not done yet is left for the next cut.
        """
        table = torch.zeros(self._here.size, COLUMNS, dtype=torch.float64)
        while self._open and all(wait.over for wait in self._open[0][2]):
            seconds, data_seconds, waits = self._open.popleft()
            table[self._here.rank] += torch.tensor([seconds, data_seconds, sum(wait.seconds for wait in waits)])
        if self._here.device.type == "cuda":
            return table.flatten().pin_memory().to(self._here.device, non_blocking=True)  # any other copy waits
        return table.flatten()


def figures(table: Sequence[float]) -> dict[str, Any]:
    """What the sum of the ranks' `cut()`s says; {} where it holds nothing.

    allreduce_fraction: the share of the time that even the rank which waits least waits for gradients to be reduced:
    the network's doing. rank_wait_fraction: what the ranks wait beyond that, on average, because others are late.
    slowest_rank works longest by itself, slowest_rank_excess times longer than the median rank (0.2: a fifth), and
    slowest_rank_by says whether that is in waiting for its images (data) or in computing (compute).
    """
    ranks = [table[i : i + COLUMNS] for i in range(0, len(table), COLUMNS)]
    if len(ranks) < 2 or min(seconds for seconds, _, _ in ranks) <= 0:
        return {}
    waits = [waited / seconds for seconds, _, waited in ranks]
    own = [max(seconds - waited, 0.0) for seconds, _, waited in ranks]
    slowest = max(range(len(own)), key=own.__getitem__)
    usual, usual_data = median_low(own), median_low(data for _, data, _ in ranks)
    by_data = ranks[slowest][1] - usual_data > (own[slowest] - usual) / 2
    return {
        "allreduce_fraction": round(min(waits), 4),
        "rank_wait_fraction": round(mean(waits) - min(waits), 4),
        "slowest_rank": slowest,
        "slowest_rank_excess": round(own[slowest] / usual - 1, 4) if usual else 0.0,
        "slowest_rank_by": "data" if by_data else "compute",
    }
