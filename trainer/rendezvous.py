"""Where the ranks find each other: a store of keys in which nothing of an earlier attempt can be mistaken for theirs.

torchrun keeps one store over all restarts, and torch 2.15 writes the ranks' addresses into it under the same keys
each time: a restarted rank then reads the address of a dead one (`Connection refused`), until the restarts are used up.
The number of the restart is no remedy: where a node comes or goes it stays the same, and nodes differ in it. So rank 0
names each attempt afresh, and proves to every other rank that the name is not an old one by answering its challenge.
"""

from __future__ import annotations

import datetime
import time
import uuid
from collections.abc import Callable

import torch.distributed as dist

from trainer.config import RunError

_POLL = 0.02  # seconds


class AbsentError(RunError):
    """Ranks that did not come."""

    everywhere = False


def fresh_store(rank: int, size: int, timeout: float, poll: Callable[[], None]) -> dist.Store:
    """The store of this attempt, on every rank; AbsentError, naming who is missing, after `timeout` seconds.

    Args:
        poll: called again and again while waiting; may raise to give up.
    """
    shared, _, _ = next(dist.rendezvous("env://", rank, size, timeout=datetime.timedelta(seconds=timeout)))
    deadline = time.monotonic() + timeout

    def wait(missing: str) -> None:
        poll()
        if time.monotonic() > deadline:
            raise AbsentError(f"{missing} of {size} did not come within distributed.timeout={timeout:g} s")
        time.sleep(_POLL)

    if rank:
        challenge = uuid.uuid4().hex
        shared.set(f"challenge/{rank}", challenge)
        while not shared.check([f"answer/{challenge}"]):
            wait("rank 0")
        name = shared.get(f"answer/{challenge}").decode()
        shared.add(f"joined/{name}", 1)
        return dist.PrefixStore(name, shared)

    name = uuid.uuid4().hex
    answered: dict[int, bytes] = {}
    while shared.add(f"joined/{name}", 0) < size - 1:
        for other in range(1, size):
            if not shared.check([f"challenge/{other}"]):
                continue
            challenge = shared.get(f"challenge/{other}")
            if challenge != answered.get(other):  # what was there before may be a dead one's
                shared.set(f"answer/{challenge.decode()}", name)
                answered[other] = challenge
        absent = [str(other) for other in range(1, size) if other not in answered]
        wait(f"rank {', '.join(absent) or 'all others'}")
    return dist.PrefixStore(name, shared)
