"""Whether all ranks still hold the same weights: after each step they must, to the last bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from trainer.config import RunError
from trainer.distributed import World
from trainer.metrics import Pending

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


class DivergedError(RunError):
    """A rank's weights are not the others'."""


def digest(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """An int64 scalar on the device that one bit changes: the sum of all numbers' bits, each tensor's times its own."""
    total = None
    for number, parameter in enumerate(parameters):
        bits = parameter.detach().view(_INTEGERS[parameter.element_size()])
        part = bits.sum(dtype=torch.int64) * (2 * number + 1)
        total = part if total is None else total + part
    assert total is not None, "a network without parameters"
    return total


class WeightCheck:
    """Compares the ranks' weights every so many steps, and reads the answer a step later."""

    def __init__(self, parameters: Iterable[torch.Tensor], here: World, every: int) -> None:
        self._parameters, self._here = list(parameters), here
        self._every = every if here.size > 1 else 0
        self._pending: tuple[int, Pending] | None = None
        self._equal_at = 0

    def after(self, step: int) -> None:
        """`step` steps are done. DivergedError on every rank if the weights were not equal when last compared."""
        self.settle()
        if self._every and step % self._every == 0:
            digests = torch.zeros(self._here.size, dtype=torch.int64, device=self._here.device)
            digests[self._here.rank] = digest(self._parameters)
            self._pending = step, Pending(digests, self._here)

    def settle(self) -> None:
        """Wait for the comparison under way."""
        if self._pending is None:
            return
        (step, pending), self._pending = self._pending, None
        digests = pending.values()
        (most, votes), *others = Counter(digests).most_common()
        if others:
            raise DivergedError(
                f"{_odd(digests, most, votes)} after step {step}; they were last compared and found "
                f"equal after step {self._equal_at}: suspect the memory of that machine or device, and go on from a "
                "checkpoint before that"
            )
        self._equal_at = step


def _odd(digests: list[float], most: float, votes: int) -> str:
    if 2 * votes <= len(digests):
        groups = {d: [r for r, other in enumerate(digests) if other == d] for d in digests}
        return f"the weights of the ranks {' and '.join(map(str, groups.values()))} differ, none being the larger half,"
    ranks = ", ".join(str(rank) for rank, found in enumerate(digests) if found != most)
    return f"the weights of rank {ranks} differ from those of the other {votes} ranks"
