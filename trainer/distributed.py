"""This process among the others: how it talks to them, and when all of them stop."""

from __future__ import annotations

import datetime
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from trainer import environment
from trainer.config import Config, ConfigError, RunError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_HEARTBEAT = 1.0  # seconds


@dataclass(frozen=True)
class World:
    """One process of a job. `rank` is global, `local_rank` counts within the node: never interchangeable."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # gloo, for decisions: never waits for the GPU's queue

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU ({torch.get_num_threads()} threads)"

    @property
    def cores(self) -> int:
        """CPU cores for this rank: its share of those the node lets it use."""
        return environment.cores(self.local_size)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all ranks in place, on its device, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, value: Any) -> Any:
        """The main rank's `value` on every rank (any picklable object); every rank must call it."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def first_on_node(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, done by the first rank of each node before the others, so that they find its files.

        However long it takes, no rank's wait for another times out. A user's mistake that any rank meets is raised on
        every rank: none is left waiting.
        """
        if self.size == 1:
            return work()
        result = None
        for mine in (self.local_rank == 0, self.local_rank != 0):
            job = Future()
            if mine:
                # A daemon, so that a rank whose peers are gone need not see it to its end.
                threading.Thread(target=_fulfil, args=(job, work), daemon=True).start()
            else:
                job.set_result(None)
            self._await_all(job)
            mistake = job.exception() if job.done() else None
            if mistake and not isinstance(mistake, ConfigError):
                raise mistake
            mistake = next((m for m in self.gather(mistake and str(mistake)) if m), None)
            if mistake:
                raise ConfigError(mistake)
            result = job.result() if mine else result
        return result

    def _await_all(self, job: Future) -> None:
        """Return when every rank's job is done, or one has failed; the ranks hear from each other every second."""
        while True:
            wait([job], timeout=_HEARTBEAT)
            state = torch.tensor([not job.done(), job.done() and job.exception() is not None], dtype=torch.int32)
            dist.all_reduce(state, op=dist.ReduceOp.MAX, group=self.control)
            busy, failed = state.tolist()
            if failed or not busy:
                return

    def on_main(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on the main rank, on every rank; a user's mistake is raised on every rank too."""
        result, mistake = None, None
        if self.is_main:
            try:
                result = work()
            except ConfigError as error:
                mistake = str(error)
        result, mistake = self.from_main((result, mistake))
        if mistake:
            raise ConfigError(mistake)
        return result

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)


@contextmanager
def world(config: Config) -> Iterator[World]:
    """Join the other ranks, and leave them when done; ConfigError where the environment or the device is not fit."""
    place = environment.place()
    rank, size = place.rank, place.size
    device = _device(config.device, place.local_rank)
    if device.type == "cpu" and not environment.threads_chosen():
        # As many threads as this rank has cores: torchrun's own default of 1 leaves the others idle.
        torch.set_num_threads(environment.cores(place.local_size))
    if size == 1:
        yield World(rank, place.local_rank, size, place.local_size, device)
        return
    environment.set_rendezvous()
    timeout = datetime.timedelta(seconds=config.distributed.timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", rank=rank, world_size=size, timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timeout)
    try:
        control = dist.new_group(backend="gloo", timeout=timeout)
        yield World(rank, place.local_rank, size, place.local_size, device, control)
    finally:
        dist.destroy_process_group()


class PeerLostError(RunError):
    """Another rank has ended or hangs."""

    everywhere = False


@contextmanager
def naming_a_lost_peer(world: World) -> Iterator[None]:
    """Turn the traceback of a broken connection into one line: what is wrong is what the other rank said."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if world.size == 1 or isinstance(error, RunError) or not lost:
            raise
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        raise PeerLostError(
            f"rank {world.rank} of {world.size} lost another rank, whose own message says why; "
            f"the same command goes on from the last save ({reason})"
        ) from error


class Agreement:
    """What all ranks decide together at a step boundary: to stop for a signal, to save.

    The signal handler only sets a flag. Each `agreed()` starts one small all-reduce of what this rank wants and returns
    the result of the one before, so no rank ever waits for it: all ranks act at the same step, two after the signal at
    the latest. A second SIGINT stops at once.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._signal = 0
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Agreement:
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def agreed(self, save: bool = False) -> tuple[int, bool]:
        """(the signal that all ranks stop for, 0 for none; whether to save). Every rank calls it once a step.

        Args:
            save: this rank finds that a save is due; one rank is enough.
        """
        wants = torch.tensor([self._signal, int(save)])
        if self._world.size == 1:
            return self._signal, save
        before = (0, False)
        if self._pending is not None:
            work, flags = self._pending
            work.wait()
            before = int(flags[0]), bool(flags[1])
        work = dist.all_reduce(wants, op=dist.ReduceOp.MAX, group=self._world.control, async_op=True)
        self._pending = work, wants
        return before


def _fulfil(job: Future, work: Callable[[], Any]) -> None:
    try:
        job.set_result(work())
    except BaseException as error:
        job.set_exception(error)


def _device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ConfigError("device=cuda, but torch sees no GPU here: use device=cpu, or check nvidia-smi and the driver")
    # With one visible device a task (srun --gpus-per-task), every local rank's device is number 0.
    return torch.device("cuda", local_rank % count)
