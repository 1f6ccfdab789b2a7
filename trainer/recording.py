"""Measures a timeline (trainer/timeline.py): when each bucket of gradients is ready within a real backward pass.

The step is the trainer's own, on synthetic images, its network in DistributedDataParallel over a world of one, so the
buckets are those that DDP settles on, of `distributed.bucket_mb` at most, in the order in which gradients come. A
communication hook notes the moment of each bucket and reduces nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trainer import learner, precision
from trainer.config import Config, ConfigError
from trainer.data.loader import TrainingBatches, open_data
from trainer.distributed import World, world
from trainer.loop import Learner, train_steps
from trainer.models import parallel
from trainer.plan import Plan
from trainer.timeline import Bucket, Timeline

SECONDS = 8.0  # of timing, at most, unless a number of steps is asked for
WARM_UP = 3  # steps: kernels are chosen, and DDP settles its buckets after the first
Moment = float | torch.cuda.Event


def on_gpu(config: Config) -> bool:
    """Whether `measure` would run on a GPU."""
    return config.device != "cpu" and torch.cuda.is_available()


def measure(config: Config, images: int, steps: int | None = None) -> Timeline:
    """The timeline of steps of `images` images under `config`, on this machine's device.

    Args:
        steps: timed ones; None: as many as fit in SECONDS, at least 3.

    Raises:
        ConfigError: the device or the environment is not fit, this process is one of several ranks, or the images do
            not fit into the device's memory.
    """
    classes = config.model.num_classes or config.data.synthetic_classes
    data = replace(config.data, source="synthetic", synthetic_classes=classes, synthetic_samples=1_281_167)
    # A replayed CUDA graph calls no hook: its step is timed without the graph.
    free = {"augment": replace(config.augment, repeats=1), "precision": replace(config.precision, cuda_graph=False)}
    config = replace(config, global_batch_size=images, data=data, **free)
    with world(config) as here:
        if here.size > 1:
            raise ConfigError(f"a timeline is one process's, and this is one of {here.size} ranks: start it alone")
        precision.set_kernels(config, here.device)
        found = open_data(config, here)
        plan = Plan.of(config, 1, found.samples)
        with _group_of_one(here):
            learned = learner.create(config, plan, here, found)
            wrapped = parallel.data_parallel(learned.model, here.device, config.distributed)
            recorder = Recorder(here, half=config.distributed.gradients == "bf16")
            recorder.watch(wrapped)
            batches = TrainingBatches(config, found, plan, here, 0)
            try:
                return _timed(replace(learned, model=wrapped), batches, recorder, images, steps)
            except torch.OutOfMemoryError as error:
                raise ConfigError(
                    f"{images} images a step do not fit into the memory of {here.device_name}: set max_batch_per_gpu=N "
                    "to accumulate them"
                ) from error


def _timed(learned: Learner, batches: Iterator, recorder: Recorder, images: int, steps: int | None) -> Timeline:
    def block(count: int) -> float:
        began = time.perf_counter()
        *_, last = train_steps(learned, batches, range(count), recorder.enter)
        last.totals.tolist()  # waits for the device
        return time.perf_counter() - began

    block(WARM_UP)
    one = block(1)
    count = steps or max(3, min(50, int(SECONDS / one)))
    recorder.passes.clear()
    # One at a time on a CPU, for the median of steps that other work disturbs; a GPU's queue must not run dry.
    seconds = (
        block(count) / count if recorder.device.type == "cuda" else statistics.median(block(1) for _ in range(count))
    )
    return recorder.timeline(images, seconds, count)


@dataclass(frozen=True)
class _Times:
    backward: float
    bytes: list[int]
    ready: list[float]


class _Pass:
    """One backward pass: its moments on the device's clock."""

    def __init__(self, begin: Moment) -> None:
        self.begin, self.end = begin, begin
        self.ready: list[Moment] = []
        self.bytes: list[int] = []

    def seconds(self) -> _Times:
        return _Times(_between(self.begin, self.end), self.bytes, [_between(self.begin, at) for at in self.ready])


class Recorder:
    """Notes when each bucket is ready, as a communication hook of DDP that leaves the gradients as they are.

    `enter` is for train_steps. Passes of a step that reduce nothing are left out.
    """

    def __init__(self, here: World, *, half: bool = False) -> None:
        """`half`: gradients are to travel as bfloat16, so rounding them belongs to the pass."""
        self.device, self._name, self._half = here.device, here.device_name, half
        self.passes: list[_Pass] = []
        self._current: _Pass | None = None

    def watch(self, model: DistributedDataParallel) -> None:
        """Become the communication hook of `model`, which has none yet."""
        model.register_comm_hook(None, lambda state, bucket: self._ready(bucket))

    def enter(self, phase: str, step: int) -> None:
        """A phase of `step` begins: a backward pass, or what comes after one."""
        if self._current is not None and self._current.ready:
            self._current.end = _now(self.device)
            self.passes.append(self._current)
        self._current = _Pass(_now(self.device)) if phase == "backward" else None

    def timeline(self, images: int, step: float, steps: int) -> Timeline:
        """Of the `steps` steps of `images` images noted since `passes` was empty, each `step` seconds long."""
        passes = [single.seconds() for single in self.passes]
        buckets = [
            Bucket(size, statistics.median(p.ready[i] for p in passes)) for i, size in enumerate(passes[0].bytes)
        ]
        return Timeline(
            device=self._name,
            images=images,
            step=step,
            backward=statistics.median(p.backward for p in passes),
            buckets=tuple(buckets),
            passes=len(passes) / steps,
        )

    def _ready(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        gradients = bucket.buffer()
        # What DDP does to each before it reduces: divide by the number of ranks.
        gradients.copy_(gradients.bfloat16()) if self._half else gradients.mul_(1.0)
        if self._current is not None:
            self._current.ready.append(_now(self.device))
            self._current.bytes.append(gradients.nbytes)
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(gradients)
        return future


@contextmanager
def _group_of_one(here: World) -> Iterator[None]:
    backend = "nccl" if here.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _now(device: torch.device) -> Moment:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin: Moment, end: Moment) -> float:
    return begin.elapsed_time(end) / 1000 if isinstance(begin, torch.cuda.Event) else end - begin
