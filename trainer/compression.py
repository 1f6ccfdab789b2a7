"""Gradients that travel as bfloat16 and are summed in float32: half the bytes of DDP's reduction.

A communication hook of DistributedDataParallel. Each rank rounds a bucket of its gradients to bfloat16 and sends every
other rank its shard of it; the shard's owner sums in float32, in the order of the ranks, divides by their number,
rounds the mean to bfloat16 and sends it to all. So the gradients g of n ranks are rounded twice, whatever n:

    |result - mean(g)|  <=  u a + u (|mean(g)| + u a),    a = mean(|g|), u = 2^-8, half of bfloat16's eps

where an all-reduce of bfloat16 adds up in it, and rounds n - 1 times more. All ranks have bitwise the same result; on
a CPU it does not depend on how gradients are put into buckets.
"""

# No deferred annotations: DDP compares those of a hook with the types themselves.

import datetime
import queue
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed import World
from trainer.signals import held


def compress(model: DistributedDataParallel, world: World, timeout: float) -> None:
    """Have `model` reduce its gradients as bfloat16; all ranks call this, before the first backward pass.

    Args:
        timeout: seconds after which a rank that waits for another gives up.
    """
    with held():
        # A group of its own: one thread issues its collectives, in the order of the buckets, whatever else goes on.
        group = dist.new_group(timeout=datetime.timedelta(seconds=timeout))
        if world.device.type == "cuda":
            reduce = _on_stream(group, torch.cuda.Stream(world.device))
        else:
            reduce = _in_thread(group)
    model.register_comm_hook(None, lambda state, bucket: reduce(bucket.buffer()))


def mean(gradients: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Replace float32 (n,) `gradients` by their mean over the ranks of `group`, as this module says; waits for it.

    On a GPU it waits as its stream does: the host goes on.
    """
    ranks, count = dist.get_world_size(group), gradients.numel()
    shard = -(-count // ranks)
    mine = torch.empty(ranks * shard, dtype=torch.bfloat16, device=gradients.device)
    mine[:count].copy_(gradients)
    mine[count:].zero_()
    theirs = torch.empty_like(mine)
    # As bytes: not every backend sends bfloat16, and none of these computes.
    dist.all_to_all_single(theirs.view(torch.uint8), mine.view(torch.uint8), group=group)
    averaged = mean_of_shards(theirs.view(ranks, shard))
    dist.all_gather_into_tensor(mine.view(torch.uint8), averaged.view(torch.uint8), group=group)
    gradients.copy_(mine[:count])


def mean_of_shards(shards: Tensor) -> Tensor:
    """The bfloat16 (n,) mean of bfloat16 (ranks, n), accumulated in float32."""
    if shards.is_cuda:  # one kernel for any number of ranks
        return shards.sum(0, dtype=torch.float32).div_(len(shards)).bfloat16()
    total = shards[0].float()  # in the order of the ranks, wherever in a shard a gradient stands
    for shard in shards[1:]:
        total.add_(shard)
    return total.div_(len(shards)).bfloat16()


def _on_stream(group: dist.ProcessGroup, stream: torch.cuda.Stream) -> Callable[[Tensor], torch.futures.Future]:
    """Reduce on a stream of its own, behind what computes the gradients; the host waits for nothing."""

    def reduce(gradients: Tensor) -> torch.futures.Future:
        future = torch.futures.Future(devices=[gradients.device])
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            mean(gradients, group)
            future.set_result(gradients)  # as soon as the stream gets here
        return future

    return reduce


def _in_thread(group: dist.ProcessGroup) -> Callable[[Tensor], torch.futures.Future]:
    """Reduce in a thread of its own, one bucket after the other, while the next is computed."""
    waiting: queue.SimpleQueue[tuple[Tensor, torch.futures.Future]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            gradients, future = waiting.get()
            try:
                mean(gradients, group)
            except Exception as error:
                future.set_result(error)
            else:
                future.set_result(gradients)

    # A daemon, so that a rank whose peers hang need not see it to its end.
    threading.Thread(target=work, name="gradients", daemon=True).start()

    def reduce(gradients: Tensor) -> torch.futures.Future:
        future: torch.futures.Future = torch.futures.Future()
        waiting.put((gradients, future))
        return future.then(_raised)

    return reduce


def _raised(future: torch.futures.Future) -> Tensor:
    """What a callback raises DDP's wait raises too; what set_exception is given it would take for gradients."""
    found = future.value()
    if isinstance(found, Exception):
        raise found
    return found
