"""A training step recorded as a CUDA graph, and replayed: forward, backward, reduction and update in one launch.

A GPU that is faster than the host can name its kernels waits for their names; a graph names them all at once. What it
reads and writes must stay where it is, so the images come in by a copy, the learning rate is a tensor on the device,
and what the host decides in a step, or waits for, is refused (`refuse`, and config_contradictions.py). The first steps
of a shape of batch are taken as they are, on the stream of the recording, so that every library has chosen its kernels
and made its buffers; recording one executes nothing, so no step is taken twice. A graph for each size of images, all in
one pool of memory.

What a rank waits for others in the reduction is not timed then. Tested on a CPU but for the recording itself; not
measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainer.config import Config, ConfigError, RunError
from trainer.distributed import World
from trainer.loop import Learner, Mixed, whole
from trainer.plan import Plan

WARM = 3  # steps before a recording
WARM_RANKS = 11  # with DDP, which times itself in its first ten: pytorch.org/docs, CUDA graphs, DistributedDataParallel


class CaptureError(RunError):
    """A step could not be recorded."""


class StaticStep:
    """A step on tensors that stay where they are, for batches of one shape."""

    def __init__(self, learner: Learner, batch: Mixed) -> None:
        self._learner = learner
        targets = torch.empty_like(batch.targets)
        labels = targets if batch.targets is batch.labels else torch.empty_like(batch.labels)
        self.batch = Mixed(torch.empty_like(batch.images), targets, labels)
        self.taken = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: tuple[torch.Tensor, torch.Tensor] | None = None  # of the graph

    def load(self, batch: Mixed) -> None:
        """Copy a batch in."""
        for mine, coming in dict(zip(self.batch, batch)).items():  # targets that are the labels once
            mine.copy_(coming, non_blocking=True)

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Totals and bad of the step of what was loaded."""
        self.taken += 1
        return whole(self._learner, self.batch)


class Static:
    """Takes steps on static tensors, an operation after the other: on a CPU what Graphs does but for the recording."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._device = device
        self.steps: dict[tuple, StaticStep] = {}
        self._renew(optimizer)
        optimizer.register_load_state_dict_post_hook(self._renew)
        optimizer.register_state_dict_post_hook(_as_any)

    def __call__(self, learner: Learner, batch: Mixed) -> tuple[torch.Tensor, torch.Tensor]:
        shape = tuple((each.shape, each.stride(), each.dtype) for each in batch)
        if shape not in self.steps:
            self.steps[shape] = StaticStep(learner, batch)
        self.steps[shape].load(batch)
        return self._take(self.steps[shape])

    def _take(self, step: StaticStep) -> tuple[torch.Tensor, torch.Tensor]:
        return step.take()

    def _renew(self, optimizer: torch.optim.Optimizer) -> None:
        """Of an optimiser that is new, or has taken other tensors for its state: no graph of the old ones is left."""
        self.steps.clear()
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=self._device)
            if "capturable" in group and self._device.type == "cuda":
                group["capturable"] = True


def _as_any(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """A save is one that a run without graphs, on a CPU too, goes on from."""
    for group in saved["param_groups"]:
        if "capturable" in group:
            group["capturable"] = False


class Graphs(Static):
    """Takes steps by replaying them."""

    def __init__(self, optimizer: torch.optim.Optimizer, here: World, stream: torch.cuda.Stream) -> None:
        super().__init__(optimizer, here.device)
        self._stream, self._warm = stream, WARM_RANKS if here.size > 1 else WARM
        self._pool = torch.cuda.graph_pool_handle()

    def _take(self, step: StaticStep) -> tuple[torch.Tensor, torch.Tensor]:
        if step.taken < self._warm:
            with on(self._stream):
                return step.take()
        if step.graph is None:
            self._record(step)
        step.graph.replay()
        return tuple(each.clone() for each in step.result)  # the next replay writes them anew

    def _record(self, step: StaticStep) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (saves, NCCL's watchdog, the loader) may go on using the device meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                step.result = step.take()
        except RuntimeError as error:
            first = str(error).strip().partition("\n")[0]
            raise CaptureError(
                f"precision.cuda_graph=true: this step cannot be recorded ({first}); leave it out"
            ) from error
        step.graph = graph


@contextmanager
def on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work on `stream` after all that is queued, and before all that will be; None: where it is."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(stream.device).wait_stream(stream)


def refuse(config: Config, plan: Plan, here: World, dtype: torch.dtype | None) -> None:
    """ConfigError where the steps of a run cannot be recorded, and precision.cuda_graph asks for it."""
    if here.device.type != "cuda":
        raise ConfigError(f"precision.cuda_graph=true needs a GPU, and device={here.device}: leave it out")
    if dtype is torch.float16 and not config.precision.static_scale:
        raise ConfigError(
            "precision.cuda_graph=true has no dynamic loss scale, and this GPU autocasts to fp16: "
            "use precision.static_scale=true, or precision.amp=bf16 or fp32"
        )
    if plan.accumulation > 1:
        raise ConfigError(
            f"precision.cuda_graph=true records steps of one forward batch, and here a step accumulates "
            f"{plan.accumulation}: raise max_batch_per_gpu, lower global_batch_size, or leave it out"
        )
