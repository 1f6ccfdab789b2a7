"""This process among the others: how it talks to them, and when all of them stop."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from trainer import environment, memory
from trainer.config import Config, ConfigError
from trainer.rendezvous import fresh_store
from trainer.signals import Stopped, StopSignals, held

_HEARTBEAT = 1.0  # seconds
_PATIENCE = 5.0  # seconds a signalled rank goes on waiting for the others to come, so that all stop together


@dataclass(frozen=True)
class World:
    """One process of a job. `rank` is global, `local_rank` counts within the node: never interchangeable."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # gloo, for decisions: never waits for the GPU's queue
    store: dist.Store | None = None  # keys that all ranks see, of this attempt alone

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

        However long it takes, no rank's wait for another times out. A user's mistake or a stop signal that any rank
        meets is raised on every rank: none is left waiting.
        """
        if self.size == 1:
            return work()
        result = None
        for mine in (self.local_rank == 0, self.local_rank != 0):
            job = Future()
            if mine:
                # A daemon, so that a rank whose peers are gone need not see it to its end.
                with held():
                    threading.Thread(target=_fulfil, args=(job, work), daemon=True).start()
            else:
                job.set_result(None)
            self._await_all(job)
            met = job.exception() if job.done() else None
            if met and not isinstance(met, (ConfigError, Stopped)):
                raise met
            met = next((m for m in self.gather(met) if m), None)
            if met:
                raise met
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
                mistake = error
        result, mistake = self.from_main((result, mistake))
        if mistake:
            raise mistake
        return result

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)


@contextmanager
def world(config: Config, signals: StopSignals | None = None) -> Iterator[World]:
    """Join the other ranks, and leave them when done; ConfigError where the environment or the device is not fit."""
    place = environment.place()
    rank, size = place.rank, place.size
    device = _device(config.device, place.local_rank)
    if device.type == "cpu":
        memory.keep_freed()
        if not environment.threads_chosen():
            # As many threads as this rank has cores: torchrun's own default of 1 leaves the others idle.
            torch.set_num_threads(environment.cores(place.local_size))
    if size == 1:
        yield World(rank, place.local_rank, size, place.local_size, device)
        return
    environment.set_rendezvous()
    store = fresh_store(rank, size, config.distributed.timeout, _patience(signals))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    how = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
    timeout = datetime.timedelta(seconds=config.distributed.timeout)
    with held():
        dist.init_process_group(store=store, rank=rank, world_size=size, timeout=timeout, **how)
        control = dist.new_group(backend="gloo", timeout=timeout)
    try:
        yield World(rank, place.local_rank, size, place.local_size, device, control, store)
    finally:
        dist.destroy_process_group()


def _patience(signals: StopSignals | None) -> Callable[[], None]:
    """Raises Stopped when called some seconds after a stop signal: torchrun sends one where another rank has died."""
    since: list[float] = []

    def poll() -> None:
        if signals is not None and signals.caught:
            since.append(time.monotonic())
            if since[-1] - since[0] > _PATIENCE:
                signals.raise_if_caught()

    return poll


class Agreement:
    """What all ranks decide together at a step boundary: to stop for a signal, to save.

    Each `agreed()` is one small all-reduce of what this rank wants. On one node it is waited for (0.12 ms of CPU time
    for two gloo ranks), so all ranks stop after the step in which the signal came. Over several nodes it takes longer
    the more ranks there are: there each call returns the result of the one before, and they stop after the next step.
    """

    def __init__(self, world: World, signals: StopSignals) -> None:
        self._world, self._signals = world, signals
        self._late = world.size > world.local_size
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def agreed(self, save: bool = False) -> tuple[int, bool]:
        """(the signal that all ranks stop for, 0 for none; whether to save). Every rank calls it equally often.

        Args:
            save: this rank finds that a save is due; one rank is enough.
        """
        if self._world.size == 1:
            return self._signals.caught, save
        before, wants = self._pending, torch.tensor([self._signals.caught, int(save)])
        work = dist.all_reduce(wants, op=dist.ReduceOp.MAX, group=self._world.control, async_op=True)
        self._pending = work, wants
        answer = before if self._late else self._pending
        if answer is None:
            return 0, False
        done, flags = answer
        done.wait()
        return int(flags[0]), bool(flags[1])


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
