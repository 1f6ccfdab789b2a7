"""A model's place on the devices: memory format, torch.compile, DistributedDataParallel and its buckets."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from trainer.config import ConfigError, Distributed

if TYPE_CHECKING:
    from trainer.distributed import World

LISTS_BUCKETS = "bucket_cap_mb_list" in inspect.signature(DistributedDataParallel).parameters  # a younger PyTorch's


def parallelize(
    model: nn.Module, world: World, distributed: Distributed, *, channels_last: bool, compile: bool
) -> nn.Module:
    """`model` on the device of this rank: memory format, compile, then DDP if there is more than one rank.

    All ranks call this, and leave with the weights and buffers of rank 0. Raises ConfigError for synchronised BatchNorm
    on a CPU, where torch has none.
    """
    if distributed.sync_bn and world.size > 1:
        if world.device.type != "cuda":
            raise ConfigError(f"distributed.sync_bn=true needs GPUs and device={world.device.type}: leave it out")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(world.device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if compile:
        # Inside DDP, because it compiles at the first call, and torch._dynamo cuts the graph at DDP's buckets only
        # within DDP's forward: that is what lets the reduction overlap with the backward pass.
        model = typing.cast(nn.Module, torch.compile(model))
    return data_parallel(model, world.device, distributed) if world.size > 1 else model


def data_parallel(
    model: nn.Module, device: torch.device, options: Distributed, group: ProcessGroup | None = None
) -> DistributedDataParallel:
    """`model` in DDP over the ranks of `group`, all of them by default; they leave with the first one's weights."""
    wrapped = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        process_group=group,
        **_buckets(model, options),
        gradient_as_bucket_view=True,
        # static_graph settles the reduction in the first backward pass, which under accumulation is in no_sync.
        static_graph=False,
    )
    # Broadcasting would send rank 0's BatchNorm statistics before every forward pass and throw away what the other
    # ranks have seen. So each rank keeps its own, and averaged_buffers makes one of them when it counts. It is set
    # only here because DDP's argument of this name leaves out the broadcast at the start as well (PyTorch #111138),
    # and forward_sync_buffers, which does not, came with PyTorch 2.13.
    wrapped.broadcast_buffers = False
    return wrapped


def _buckets(model: nn.Module, options: Distributed) -> dict[str, Any]:
    """How DDP is told of its buckets."""
    if options.last_bucket_mb >= options.bucket_mb or not LISTS_BUCKETS:
        return {"bucket_cap_mb": options.bucket_mb}
    sizes = [p.nbytes for p in model.parameters() if p.requires_grad]
    limits = bucket_limits(sizes, options.last_bucket_mb * 2**20, options.bucket_mb * 2**20)
    return {"bucket_cap_mb_list": [limit / 2**20 for limit in limits]}


def bucket_limits(sizes: Sequence[int], last: int, most: int) -> list[int]:
    """Bytes of each bucket, in the order in which they are reduced.

    DDP fills buckets from the last layer on, and what is left for the last bucket can be of any size. Nothing hides its
    reduction, for the backward pass ends with it. So buckets are cut from the first layer on: `last` bytes, then twice
    as many each time, up to `most`.

    Args:
        sizes: bytes of each parameter, in the order of the forward pass, which is that of gradients reversed.
    """
    limits, limit, size = [], last, 0
    for more in sizes:
        size += more
        if size >= limit:  # DDP too closes a bucket with the parameter that fills it
            limits.append(size)
            limit, size = min(2 * limit, most), 0
    if size < last and limits:  # too little for a reduction of its own
        limits[-1] += size
    else:
        limits.append(size)
    return limits[::-1]


def settle_buckets(model: nn.Module, world: World, image_size: int) -> None:
    """Let DDP choose its buckets now, by a backward pass whose gradients are thrown away; all ranks call this.

    DDP lays the gradients out anew, in the order they came in, after its first backward pass. Where a gradient stands
    decides in which order more than two ranks are added, so the first step of a process rounds differently from the
    same step of one that runs already: with four gloo ranks a resumed run's weights were not those of an unbroken one.
    """
    # Two numbers have one sum; and a compiled network would be compiled once more for this.
    if world.size <= 2 or not isinstance(model, DistributedDataParallel) or "_orig_mod" in model.module._modules:
        return
    model.eval()  # leaves BatchNorm's statistics and the random numbers alone
    model(torch.zeros(1, 3, image_size, image_size, device=world.device)).sum().backward()
    model.zero_grad(set_to_none=True)
    model.train()
