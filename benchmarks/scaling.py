"""The step of many ranks against that of one, and against what the plan command predicts; all measured in one run.

    python benchmarks/scaling.py [--ranks 2] [--case NAME,SIZE,BATCH ...] [--variants fp32 bf16 ...] [--blocks 5]
                                 [--steps 4] [--out FILE]

Ranks of one thread each are processes that stay; blocks of what they do alternate, first steps uncounted:

    alone      rank 0 takes bare steps of BATCH synthetic images, nobody else works
    wrapped    the same in DistributedDataParallel over itself
    recorded   the same with the moments of its buckets noted: the timeline that a prediction rests on
    beside     all ranks do that at once without talking: what they take from each other in memory and power
    VARIANT    all ranks train together over gloo

The link is fitted to reductions of two sizes between the same ranks: seconds = a + c * bytes, and the CPU seconds that
a rank spends in a second of it, for gloo's threads take them from the backward pass. `--ranks 1` on a GPU compares
wrapped and bare there. Efficiency is alone / VARIANT; predictions are over what was measured, from the timeline alone
and from the one beside the others. Prints a table; --out writes all of it as JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from about import about

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from launch.scaling import replay  # noqa: E402
from trainer import compression, learner, memory, precision  # noqa: E402
from trainer.config import Config, Data, Distributed, Model, Optim  # noqa: E402
from trainer.data.loader import DataSet, TrainingBatches  # noqa: E402
from trainer.distributed import World  # noqa: E402
from trainer.loop import Learner, train_steps  # noqa: E402
from trainer.models import parallel  # noqa: E402
from trainer.plan import Plan  # noqa: E402
from trainer.recording import Recorder  # noqa: E402
from trainer.timeline import Timeline  # noqa: E402

CASES = ("resnet20,32,64", "resnet50,64,16", "resnet50,224,8")
GPU_CASES = ("resnet50,224,256",)
VARIANTS = {
    "fp32": Distributed(),
    "bf16": Distributed(gradients="bf16"),
    "equal buckets": Distributed(last_bucket_mb=Distributed.bucket_mb),
    "bucket 1 MB": Distributed(bucket_mb=1),
    "bucket 100 MB": Distributed(bucket_mb=100, last_bucket_mb=100),
}
SMALL, LARGE = 2**18, 2**25  # bytes of the two reductions
PATIENCE = 1800.0


class Link(NamedTuple):
    """Seconds of a reduction of S bytes: start + slope * S; `steal`: CPU seconds of a rank in a second of it."""

    start: float
    slope: float
    steal: float


class Rank:
    """One process: what it builds for a case, and the blocks that it times."""

    def __init__(self, rank: int, ranks: int, store: str) -> None:
        torch.set_num_threads(1)
        cuda = ranks == 1 and torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if cuda else torch.device("cpu")
        memory.keep_freed()
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)
        self._world = World(rank, rank, ranks, ranks, self.device)
        self._single = World(0, 0, 1, 1, self.device)
        self._own = [dist.new_group([other]) for other in range(ranks)][rank]
        self._learned: dict[str, Learner] = {}

    def build(self, case: str, variants: list[str]) -> None:
        name, size, batch = case.split(",")
        classes = 10 if int(size) <= 32 else 1000
        self._images = int(batch)
        self._config = Config(
            global_batch_size=self._images,
            model=Model(name=name),
            data=Data(source="synthetic", image_size=int(size), synthetic_classes=classes),
            optim=Optim(lr=0.01),
        )
        names = tuple(f"class{i}" for i in range(classes))
        self._data = DataSet(None, None, self._config.data.synthetic_samples, names, "synthetic")
        precision.set_kernels(self._config, self.device)
        self._recorder = Recorder(self._single)
        self._learned = {"alone": self._create(self._single, Distributed())}
        for what in ("wrapped", "recorded"):
            made = self._create(self._single, Distributed())
            model = parallel.data_parallel(made.model, self.device, Distributed(), self._own)
            if what == "recorded":
                self._recorder.watch(model)
            self._learned[what] = replace(made, model=model)
        for variant in variants:
            self._learned[variant] = self._create(self._world, VARIANTS[variant])

    def _create(self, here: World, distributed: Distributed) -> Learner:
        self._plan = Plan.of(self._config, 1, self._data.samples)
        config = replace(self._config, distributed=distributed)
        return learner.create(config, self._plan, here, self._data)

    def steps(self, what: str, count: int) -> float:
        """Seconds of a step, of `count` of them after one that is not counted."""
        batches = TrainingBatches(self._config, self._data, self._plan, self._single, 0)
        learned, enter = self._learned[what], self._recorder.enter if what == "recorded" else lambda phase, step: None
        for record in train_steps(learned, batches, range(count + 1), enter):
            if record.step == 0:
                record.totals.tolist()  # waits for the device
                began = time.perf_counter()
                self._recorder.passes.clear()
        record.totals.tolist()
        seconds = (time.perf_counter() - began) / count
        if what == "recorded":
            self._timeline = self._recorder.timeline(self._images, seconds, count)
        return seconds

    def timeline(self) -> Timeline:
        return self._timeline

    def link(self, kind: str, count: int) -> Link:
        """Fitted to `count` reductions of each size by the variant `kind`."""
        reduce: Callable[[torch.Tensor], Any] = compression.mean if kind == "bf16" else dist.all_reduce
        found = {}
        for size in (SMALL, LARGE):
            gradients = torch.zeros(size // 4)
            reduce(gradients)
            walls, began, cpu = [], time.perf_counter(), time.process_time()
            for _ in range(count):
                before = time.perf_counter()
                reduce(gradients)
                walls.append(time.perf_counter() - before)
            share = (time.process_time() - cpu) / (time.perf_counter() - began)
            found[size] = statistics.median(walls), share
        slope = (found[LARGE][0] - found[SMALL][0]) / (LARGE - SMALL)
        return Link(max(0.0, found[SMALL][0] - slope * SMALL), slope, min(1.0, found[LARGE][1]))


def serve(rank: int, ranks: int, store: str, pipe: Connection) -> None:
    """Do what the parent asks, until it asks for nothing more."""
    mine = Rank(rank, ranks, store)
    while (request := pipe.recv()) is not None:
        method, arguments = request
        pipe.send(getattr(mine, method)(*arguments))
    dist.destroy_process_group()


class Ranks:
    """The processes, as their parent sees them."""

    def __init__(self, ranks: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        spawn = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(ranks):
            mine, theirs = spawn.Pipe()
            store = f"{self._folder.name}/store"
            process = spawn.Process(target=serve, args=(rank, ranks, store, theirs), daemon=True)
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)

    def all(self, method: str, *arguments: Any) -> list[Any]:
        """What each rank answers; they do it at the same time."""
        return self._ask(self._pipes, method, arguments)

    def first(self, method: str, *arguments: Any) -> Any:
        return self._ask(self._pipes[:1], method, arguments)[0]

    def _ask(self, pipes: list[Connection], method: str, arguments: tuple[Any, ...]) -> list[Any]:
        for pipe in pipes:
            pipe.send((method, arguments))
        if not all(pipe.poll(PATIENCE) for pipe in pipes):
            raise TimeoutError(f"{method}{arguments}: no answer for {PATIENCE:g} s")
        return [pipe.recv() for pipe in pipes]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(30)
            process.kill()
        self._folder.cleanup()


def predicted(timeline: Timeline, link: Link) -> float:
    cost = replay(timeline, lambda size: link.start + link.slope * size, link.steal)
    return timeline.step + cost.exposed + cost.slowed


def run(ranks: Ranks, case: str, variants: list[str], blocks: int, count: int) -> dict:
    """All figures of one case."""
    ranks.all("build", case, variants)
    seconds: dict[str, list[float]] = {"alone": [], "wrapped": [], "recorded": [], "beside": []}
    seconds |= {variant: [] for variant in variants}
    ratios: dict[str, list[float]] = {f"{v}, {how}": [] for v in variants for how in ("alone", "beside")}
    links: dict[str, list[Link]] = {variant: [] for variant in variants}
    for what in ("alone", "wrapped", "recorded", *variants):
        ranks.all("steps", what, 2)  # buckets are settled, memory is there
    for _ in range(blocks):
        for what in ("alone", "wrapped", "recorded"):
            seconds[what].append(ranks.first("steps", what, count))
        timelines = {"alone": ranks.first("timeline")}
        if variants:
            seconds["beside"].append(max(ranks.all("steps", "recorded", count)))
            timelines["beside"] = replace(ranks.first("timeline"), step=seconds["beside"][-1])
        for variant in variants:
            seconds[variant].append(max(ranks.all("steps", variant, count)))
            links[variant].append(ranks.all("link", "bf16" if variant == "bf16" else "fp32", 5)[0])
            for how, timeline in timelines.items():
                if replace(VARIANTS[variant], gradients="fp32") == Distributed():  # its buckets are the recorded ones
                    ratio = predicted(timeline, links[variant][-1]) / seconds[variant][-1]
                    ratios[f"{variant}, {how}"].append(ratio)
    return {
        "milliseconds": {what: _spread([1000 * s for s in found]) for what, found in seconds.items() if found},
        "ddp_over_bare": _spread([a / b for a, b in zip(seconds["alone"], seconds["wrapped"])]),
        "efficiency": {v: _spread([a / b for a, b in zip(seconds["alone"], seconds[v])]) for v in variants},
        "efficiency_beside": {v: _spread([a / b for a, b in zip(seconds["beside"], seconds[v])]) for v in variants},
        "link": {
            variant: {key: statistics.median(getattr(link, key) for link in found) for key in Link._fields}
            for variant, found in links.items()
        },
        "predicted_over_measured": {name: _spread(found) for name, found in ratios.items() if found},
        "timeline": [[b.bytes, round(1000 * b.ready, 3)] for b in timelines["alone"].buckets],
        "backward_milliseconds": round(1000 * timelines["alone"].backward, 3),
    }


def _spread(found: list[float]) -> list[float]:
    """Median, least, most."""
    return [round(value, 4) for value in (statistics.median(found), min(found), max(found))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1 if torch.cuda.is_available() else 2)
    parser.add_argument("--case", nargs="+", metavar="NAME,SIZE,BATCH")
    parser.add_argument("--variants", nargs="+", default=["fp32", "bf16"], choices=VARIANTS)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="a block")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = about() | {"ranks": options.ranks, "blocks": options.blocks, "steps": options.steps, "cases": {}}
    ranks = Ranks(options.ranks)
    try:
        for case in options.case or (GPU_CASES if torch.cuda.is_available() and options.ranks == 1 else CASES):
            variants = options.variants if options.ranks > 1 else []
            found = run(ranks, case, variants, options.blocks, options.steps)
            result["cases"][case] = found
            print(f"{case}: ms {found['milliseconds']}", flush=True)
            for key in ("ddp_over_bare", "efficiency", "efficiency_beside", "predicted_over_measured", "link"):
                print(f"    {key:24} {found[key]}", flush=True)
    finally:
        ranks.close()
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
