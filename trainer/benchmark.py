"""The benchmark command: how fast one part of a run is, under its own config, on this machine.

Each prints one JSON line on the main rank. Against other loaders and bare libjpeg-turbo: benchmarks/loader.py.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from trainer import learner, precision
from trainer.config import Config, ConfigError
from trainer.data.loader import Batch, TrainingBatches, open_data
from trainer.distributed import World, world
from trainer.loop import Learner, train_steps
from trainer.models import build
from trainer.plan import Plan

BLOCKS = 5  # of each kind, alternating


def loader(config: Config, images: int) -> int:
    """Load at least `images` a block as training would, beginning at step 0, and train nothing; 0.

    Blocks of decoding alone, of the same windows of the same images, stand between: the limit of the rest. The share is
    one of CPU time where the CPU decodes, of wall time on a GPU.
    """
    with world(config) as here:
        data = open_data(config, here)
        plan = Plan.of(config, here.size, data.samples)
        count = -(-images // plan.batch)
        sources: dict[str, Iterator[object]] = {"ours": TrainingBatches(config, data, plan, here, 0)}
        if config.data.source == "dali":
            sources["decoding"] = TrainingBatches.decoded_alone(config, data, plan, here)
        found: dict[str, list[_Cost]] = {name: [] for name in sources}
        for _ in range(BLOCKS):
            for name, batches in sources.items():
                found[name].append(_cost(batches, count, ahead(config)))
        clock = "wall" if here.device.type == "cuda" and config.data.decoder != "cpu" else "cpu"
        cpu, wall = _median(found["ours"], "cpu"), _median(found["ours"], "wall")
        share = _median(found["decoding"], clock) / _median(found["ours"], clock) if "decoding" in found else None
        images = count * plan.batch
        _say(
            here,
            images=images,
            images_per_second=round(images / wall, 1),
            images_per_cpu_second=round(images / cpu, 1),  # of this rank, over all its threads
            share_of_decoding_limit=share and round(share, 3),
            cores_busy=round(cpu / wall, 2),
            batch=plan.batch,
        )
    return 0


class _Cost(NamedTuple):
    """Seconds of a block: of all cores together, and on the clock."""

    cpu: float
    wall: float


def _cost(batches: Iterator[object], count: int, uncounted: int) -> _Cost:
    """Of `count` batches, after some in which the queues fill: as much is under way at the end as at the beginning."""
    for _ in range(uncounted):
        next(batches)
    cpu, began = time.process_time(), time.perf_counter()
    for _ in range(count):
        next(batches)
    return _Cost(time.process_time() - cpu, time.perf_counter() - began)


def end_to_end(config: Config, steps: int) -> int:
    """Train on real and on synthetic batches, blocks of `steps` of them in turn; 0. Nothing is saved.

    Raises:
        ConfigError: the config has no real data.
    """
    if config.data.source == "synthetic":
        raise ConfigError("data.source=synthetic has no real batches to compare with: use data.source=dali")
    with world(config) as here:
        precision.set_kernels(config, here.device)
        data = open_data(config, here)
        plan = Plan.of(config, here.size, data.samples)
        learned = learner.create(config, plan, here, data)
        sources = {
            "synthetic": TrainingBatches(config, replace(data, train=None), plan, here, 0),
            "real": TrainingBatches(config, data, plan, here, 0),
        }
        # The first steps of a block are not counted: the queue that the other block let fill, or left to be filled.
        block = _Block(learned, ahead(config), steps)
        rates: dict[str, list[float]] = {name: [] for name in sources}
        for _ in range(BLOCKS):
            for name, batches in sources.items():
                rates[name].append(steps * plan.global_batch / block.seconds(batches))
        ratios = [real / synthetic for real, synthetic in zip(rates["real"], rates["synthetic"])]
        _say(
            here,
            images_per_second={name: round(statistics.median(values), 2) for name, values in rates.items()},
            ratio=round(statistics.median(ratios), 3),
            ratio_spread=[round(min(ratios), 3), round(max(ratios), 3)],
        )
    return 0


def step(config: Config, steps: int) -> int:
    """Train on the same synthetic batch over and over, blocks of `steps`; 0. Nothing is read, evaluated or saved."""
    config = replace(config, data=replace(config.data, source="synthetic"))
    with world(config) as here:
        precision.set_kernels(config, here.device)
        data = open_data(config, here)
        plan = Plan.of(config, here.size, data.samples)
        learned = learner.create(config, plan, here, data)
        block = _Block(learned, 3, steps)
        rates = [
            steps * plan.global_batch / block.seconds(TrainingBatches(config, data, plan, here, 0))
            for _ in range(BLOCKS)
        ]
        on_gpu = here.device.type == "cuda"
        _say(
            here,
            images_per_second=round(statistics.median(rates), 2),
            spread=[round(min(rates), 2), round(max(rates), 2)],
            max_memory_gb=round(torch.cuda.max_memory_allocated(here.device) / 1e9, 2) if on_gpu else None,
            global_batch=plan.global_batch,
        )
    return 0


def all_reduce(config: Config, count: int) -> int:
    """Sum as many float32 as the network has parameters over all ranks, blocks of `count` times; 0.

    Raises:
        ConfigError: there is one rank.
    """
    config = replace(config, data=replace(config.data, source="synthetic"))
    with world(config) as here:
        if here.size == 1:
            raise ConfigError("benchmark allreduce needs ranks: torchrun --nproc-per-node 2 -m trainer benchmark ...")
        network = build.create(config.model, config.model.num_classes or config.data.synthetic_classes)
        gradients = torch.zeros(sum(p.numel() for p in network.parameters()), device=here.device)

        def seconds() -> float:
            here.barrier()
            began = time.perf_counter()
            for _ in range(count):
                dist.all_reduce(gradients)
            gradients[0].item()  # waits for the device
            return max(here.gather((time.perf_counter() - began) / count))

        seconds()  # connections are made
        found = [seconds() for _ in range(BLOCKS)]
        middle = statistics.median(found)
        sent = 2 * (here.size - 1) / here.size * 4 * gradients.numel()  # bytes a rank in a ring
        _say(
            here,
            milliseconds=round(1000 * middle, 3),
            spread=[round(1000 * min(found), 3), round(1000 * max(found), 3)],
            megabytes=round(4 * gradients.numel() / 1e6, 1),
            ring_gb_per_second=round(sent / middle / 1e9, 3),
        )
    return 0


def _median(costs: list[_Cost], clock: str) -> float:
    return statistics.median(getattr(cost, clock) for cost in costs)


class _Block:
    """Blocks of steps, of which the first are not counted."""

    def __init__(self, learned: Learner, uncounted: int, counted: int) -> None:
        self._learner, self._uncounted, self._counted = learned, uncounted, counted

    def seconds(self, batches: Iterator[Batch]) -> float:
        """Seconds for the counted steps, until the device has finished them."""
        began = 0.0
        for record in train_steps(self._learner, batches, range(self._uncounted + self._counted)):
            if record.step == self._uncounted - 1:
                record.totals.tolist()  # waits for the device
                began = time.perf_counter()
        record.totals.tolist()
        return time.perf_counter() - began


COMMANDS: dict[str, tuple[Callable[[Config, int], int], int]] = {  # with how many images or steps by default
    "loader": (loader, 400),
    "step": (step, 10),
    "end-to-end": (end_to_end, 10),
    "allreduce": (all_reduce, 10),
}


def ahead(config: Config) -> int:
    """Batches that may be under way: both of the loader's queues, and what is being resized between them."""
    return 2 * config.data.prefetch + 3


def _say(here: World, **figures: object) -> None:
    if here.is_main:
        print(json.dumps({"device": here.device_name, "ranks": here.size, **figures}))
