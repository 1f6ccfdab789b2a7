"""The part of a gradient's reduction that the backward pass does not hide, timed without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class Wait:
    """From one moment of a device's work to a later one: the host's clock for a CPU, two events for a GPU."""

    __slots__ = ("_begin", "_device", "_end")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin: float | torch.cuda.Event | None = None
        self._end: float | torch.cuda.Event | None = None

    def begin(self) -> None:
        self._begin = self._now()

    def end(self) -> None:
        self._end = self._now()

    @property
    def over(self) -> bool:
        """Whether the device has done what lies before the end, so that `seconds` is known; asks, and never waits."""
        return not isinstance(self._end, torch.cuda.Event) or self._end.query()

    @property
    def seconds(self) -> float:
        """Its length; 0 where it never began. To be read when it is over."""
        if self._begin is None or self._end is None:
            return 0.0
        if isinstance(self._begin, torch.cuda.Event):
            return self._begin.elapsed_time(self._end) / 1000
        return self._end - self._begin

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Backward:
    """The backward passes of one step; `waits` holds what those that reduce gradients waited for it, if any.

    DistributedDataParallel reduces one bucket of gradients while the next is computed. When all are computed, autograd
    runs the callbacks queued during the pass, and DDP's own waits there for the reductions still under way. Ours is
    queued first, so from it to the return of backward() is that wait: what the reduction adds to the step. It holds
    the time for which other ranks are late as well; trainer/balance.py tells the two apart.
    """

    def __init__(self, device: torch.device, begins: Callable[[], object]) -> None:
        """`begins` is called before each pass."""
        self.waits: list[Wait] = []
        self._device, self._begins = device, begins

    def __call__(self, loss: torch.Tensor, *, reduces: bool) -> None:
        """loss.backward(); `reduces`: DDP reduces the gradients in it."""
        self._begins()
        if not reduces:
            loss.backward()
            return
        wait = Wait(self._device)
        loss.register_hook(lambda _: torch.autograd.Variable._execution_engine.queue_callback(wait.begin))
        loss.backward()
        wait.end()
        self.waits.append(wait)
