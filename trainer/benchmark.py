"""The benchmark command: how fast one part of a run is, under its own config, on this machine.

Each prints one JSON line on the main rank. Against other loaders and the limit of decoding: benchmarks/loader.py.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from trainer import learner, precision
from trainer.config import Config, ConfigError
from trainer.data.loader import Batch, TrainingBatches, open_data
from trainer.distributed import World, world
from trainer.loop import Learner, train_steps
from trainer.plan import Plan

BLOCKS = 5  # of each kind, alternating


def loader(config: Config, images: int) -> int:
    """Load at least `images` as training would, beginning at step 0, and train nothing; 0."""
    with world(config) as here:
        data = open_data(config, here)
        plan = Plan.of(config, here.size, data.samples)
        batches = TrainingBatches(config, data, plan, here, 0)
        count = -(-images // plan.batch)
        for _ in range(ahead(config)):  # as much is under way at the end of the clock as at its beginning
            next(batches)
        cpu, began = time.process_time(), time.perf_counter()
        for _ in range(count):
            next(batches)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - began
        _say(
            here,
            images=count * plan.batch,
            images_per_second=round(count * plan.batch / wall, 1),
            images_per_cpu_second=round(count * plan.batch / cpu, 1),  # of this rank, over all its threads
            cores_busy=round(cpu / wall, 2),
            batch=plan.batch,
        )
    return 0


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
    "loader": (loader, 2000),
    "end-to-end": (end_to_end, 10),
}


def ahead(config: Config) -> int:
    """Batches that may be under way: both of the loader's queues, and what is being resized between them."""
    return 2 * config.data.prefetch + 3


def _say(here: World, **figures: object) -> None:
    if here.is_main:
        print(json.dumps({"device": here.device_name, "ranks": here.size, **figures}))
