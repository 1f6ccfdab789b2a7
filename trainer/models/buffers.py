"""BatchNorm statistics over the ranks: each keeps those of the images it has seen, evaluation uses their mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from trainer.distributed import World


@contextmanager
def averaged_buffers(model: nn.Module, world: World) -> Iterator[None]:
    """The mean over the ranks of `model`'s floating-point buffers for the duration, then each rank's own again.

    Given back, and not kept, so that a run's own statistics do not depend on when it was evaluated. One all-reduce.
    """
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if world.size == 1 or not buffers:
        yield
        return
    # In double precision, where sum and quotient of equal numbers are exact: a buffer that agrees is left as it is.
    own = torch.cat([buffer.double().flatten() for buffer in buffers])
    mean = world.sum(own.clone()) / world.size
    sizes = [buffer.numel() for buffer in buffers]
    _fill(buffers, mean.split(sizes))
    try:
        yield
    finally:
        _fill(buffers, own.split(sizes))


def mean_buffers(ranks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of each floating-point buffer over the ranks' buffers by name; others are the first rank's."""
    first, *_ = ranks
    return {
        name: torch.stack([rank[name].double() for rank in ranks]).mean(0).to(buffer.dtype)
        if buffer.is_floating_point()
        else buffer
        for name, buffer in first.items()
    }


def _fill(buffers: list[torch.Tensor], values: tuple[torch.Tensor, ...]) -> None:
    with torch.no_grad():
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value.view_as(buffer))
