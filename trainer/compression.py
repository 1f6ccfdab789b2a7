"""Gradients that travel as bfloat16 and are summed in float32: half the bytes of DDP's reduction.

A communication hook of DistributedDataParallel. Each rank rounds a bucket of its gradients to bfloat16 and sends every
other rank its shard of it; the shard's owner sums in float32, in the order of the ranks. Over several nodes that is
done twice, within each node and then between those of the same place in their nodes, so that the network carries a
rank's shard and not its whole bucket. The mean is rounded to bfloat16 and sent back the same way. So the gradients g of
n ranks are rounded twice, three times over several nodes, whatever n; on one node

    |result - mean(g)|  <=  u a + u (|mean(g)| + u a),    a = mean(|g|), u = 2^-8, half of bfloat16's eps

where an all-reduce of bfloat16 adds up in it, and rounds n - 1 times more. All ranks have bitwise the same result; on
a CPU it does not depend on how gradients are put into buckets.
"""

# No deferred annotations: DDP compares those of a hook with the types themselves.

import datetime
import queue
import threading
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from trainer import environment
from trainer.distributed import World
from trainer.signals import held

Levels = Sequence[dist.ProcessGroup | None]


def compress(
    model: DistributedDataParallel, world: World, timeout: float, nodes: list[list[int]] | None = None
) -> None:
    """Have `model` reduce its gradients as bfloat16; all ranks call this, before the first backward pass.

    Args:
        timeout: seconds after which a rank that waits for another gives up.
        nodes: the ranks of each node; None: by their host names.
    """
    with held():
        levels = _levels(world, nodes or _nodes(world), datetime.timedelta(seconds=timeout))
        on_gpu = world.device.type == "cuda"
        reduce = _on_stream(levels, torch.cuda.Stream(world.device)) if on_gpu else _in_thread(levels)
    model.register_comm_hook(None, lambda state, bucket: reduce(bucket.buffer()))


def _nodes(world: World) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for rank, host in enumerate(world.gather(environment.host())):
        found.setdefault(host, []).append(rank)
    return list(found.values())


def _levels(world: World, nodes: list[list[int]], timeout: datetime.timedelta) -> Levels:
    """This rank's groups, within its node and between nodes; all ranks in one where nodes are single or unequal.

    Groups of our own, so that one thread issues all their collectives, in the order of the buckets, whatever else goes
    on.
    """
    sizes = {len(node) for node in nodes}
    if len(nodes) == 1 or sizes == {1} or len(sizes) > 1:
        return [dist.new_group(timeout=timeout)]
    levels = []
    for level in (nodes, [list(ranks) for ranks in zip(*nodes)]):
        # Every rank makes every group, in the same order.
        groups = [(ranks, dist.new_group(ranks, timeout=timeout)) for ranks in level]
        levels += [group for ranks, group in groups if world.rank in ranks]
    return levels


def mean(gradients: Tensor, levels: Levels = (None,)) -> None:
    """Replace float32 (n,) `gradients` by their mean over the ranks of all `levels`, as this module says.

    Waits for it; on a GPU only its stream does.

    Args:
        levels: groups of this rank, each of which sums what the one before it has summed.
    """
    piece, counts, ranks = gradients, [], 1
    for group in levels:
        counts.append(piece.numel())
        ranks *= dist.get_world_size(group)
        piece = _shard_of_sum(piece, group)
    result = piece.div_(ranks).bfloat16()
    for group, count in zip(reversed(levels), reversed(counts)):
        whole = result.new_empty(dist.get_world_size(group) * result.numel())
        dist.all_gather_into_tensor(whole.view(torch.uint8), result.view(torch.uint8), group=group)
        result = whole[:count].contiguous()
    gradients.copy_(result)


def _shard_of_sum(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's float32 shard of the sum over `group` of float32 (n,) `values`, which travel as bfloat16."""
    ranks, count = dist.get_world_size(group), values.numel()
    shard = -(-count // ranks)
    mine = torch.empty(ranks * shard, dtype=torch.bfloat16, device=values.device)
    mine[:count].copy_(values)
    mine[count:].zero_()
    theirs = torch.empty_like(mine)
    # As bytes: not every backend sends bfloat16, and none of these computes.
    dist.all_to_all_single(theirs.view(torch.uint8), mine.view(torch.uint8), group=group)
    return sum_of_shards(theirs.view(ranks, shard))


def sum_of_shards(shards: Tensor) -> Tensor:
    """The float32 (n,) sum of bfloat16 (ranks, n), accumulated in float32."""
    if shards.is_cuda:  # one kernel for any number of ranks
        return shards.sum(0, dtype=torch.float32)
    total = shards[0].float()  # in the order of the ranks, wherever in a shard a gradient stands
    for shard in shards[1:]:
        total.add_(shard)
    return total


def _on_stream(levels: Levels, stream: torch.cuda.Stream) -> Callable[[Tensor], torch.futures.Future]:
    """Reduce on a stream of its own, behind what computes the gradients; the host waits for nothing."""

    def reduce(gradients: Tensor) -> torch.futures.Future:
        future = torch.futures.Future(devices=[gradients.device])
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            mean(gradients, levels)
            future.set_result(gradients)  # as soon as the stream gets here
        return future

    return reduce


def _in_thread(levels: Levels) -> Callable[[Tensor], torch.futures.Future]:
    """Reduce in a thread of its own, one bucket after the other, while the next is computed."""
    waiting: queue.SimpleQueue[tuple[Tensor, torch.futures.Future]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            gradients, future = waiting.get()
            try:
                mean(gradients, levels)
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
