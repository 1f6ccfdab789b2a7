"""`inspect CONFIG`: is this machine ready for a run, how long will it take, and what will bound it.

Under torchrun all ranks take part, as they would in the run; alone, one rank is timed, and two processes try the
machine's own all-reduce.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from trainer import environment, learner, machine, precision
from trainer.benchmark import ahead
from trainer.config import Config, ConfigError
from trainer.data.loader import DataSet, TrainingBatches, open_data
from trainer.distributed import World, world
from trainer.loop import Learner, train_steps
from trainer.machine import Findings
from trainer.models import build
from trainer.plan import Plan
from trainer.report.console import duration
from trainer.report.health import COMMUNICATION

LOADER, STEP, REDUCE = 7.0, 8.0, 3.0  # seconds of timing: under 20 with what lies between
PATIENCE = 120.0  # seconds for two processes to start and answer: they import torch, perhaps from a slow disk
CPU_BATCH = 8  # images of a timed step on a CPU, where a whole batch may take minutes


def inspect_run(config: Config) -> int:
    """Print, on the main rank, what this machine has for `config` and how fast it is; 1 if something is missing."""
    found = Findings()
    try:
        with world(config) as here:
            machine.look(config, here, found)
            try:
                _data_and_speed(config, here, found)
            except ConfigError as error:
                found.missing.append(str(error))
            status = max(here.gather(int(bool(found.missing))))
            if here.is_main:
                print("\n".join(found.lines()), flush=True)
    except ConfigError as error:  # the device or the environment of the ranks
        status = 1
        if environment.place().rank == 0:
            print(f"missing      {error}", flush=True)
    return status


def _data_and_speed(config: Config, here: World, found: Findings) -> None:
    precision.set_kernels(config, here.device)
    data = open_data(config, here)
    val = "not evaluated" if data.val is None else f"{len(data.val):,} to evaluate"
    found.rows.append(("data set", f"{data.samples:,} images in {len(data.classes):,} classes, {val}"))
    plan = Plan.of(config, here.size, data.samples)
    found.rows.append(("plan", str(plan)))
    few = plan if here.device.type == "cuda" else replace(plan, batch=min(plan.batch, CPU_BATCH), accumulation=1)
    learned = learner.create(config, few, here, data)
    parameters = sum(p.numel() for p in build.unwrap(learned.model).parameters())
    machine.look_at_disk(config, parameters, found)
    loader = _loader_rate(config, data, plan, here)
    if loader is not None:
        found.rows.append(("loader", f"{_rate(loader)} alone, of all ranks"))
    step, waiting = _step_rate(learned, config, data, few, here)
    of = "" if few is plan else f" (in batches of {few.batch})"
    found.rows.append(("step", f"{_rate(step)} alone, of all ranks{of}"))
    _reduction(config, parameters, waiting, here, found)
    _predict(config, data, plan, here, found, (loader, step, waiting))


def _loader_rate(config: Config, data: DataSet, plan: Plan, here: World) -> float | None:
    """Images a second that the loaders of all ranks give, as the slowest of them allows; None: they are synthetic."""
    if data.train is None:
        return None
    batches = TrainingBatches(config, data, plan, here, 0)
    began, count = time.perf_counter(), 0
    for _ in range(ahead(config)):  # queues that fill while nobody takes from them would be counted as speed
        next(batches)
        if time.perf_counter() - began > LOADER / 2:
            break
    began = time.perf_counter()
    while count == 0 or time.perf_counter() - began < LOADER / 2:
        next(batches)
        count += 1
    return min(here.gather(count * plan.batch / (time.perf_counter() - began))) * here.size


def _step_rate(learned: Learner, config: Config, data: DataSet, plan: Plan, here: World) -> tuple[float, float]:
    """(images a second of all ranks on images that cost nothing, share of it spent waiting for gradients)."""
    batches = TrainingBatches(config, replace(data, train=None), plan, here, 0)

    def block(steps: int) -> tuple[float, float]:
        began, waits = time.perf_counter(), []
        for record in train_steps(learned, batches, range(steps)):
            waits += record.waits
        record.totals.tolist()  # waits for the device
        return time.perf_counter() - began, sum(wait.seconds for wait in waits)

    block(2)  # kernels are chosen
    one, _ = block(1)
    steps = min(here.gather(max(1, min(100, int(STEP / 2 / one)))))  # all ranks take as many
    seconds, waited = block(steps)
    images = steps * plan.batch * plan.accumulation
    waiting = min(here.gather(waited / seconds))
    return min(here.gather(images / seconds)) * here.size, waiting


def _reduction(config: Config, parameters: int, waiting: float, here: World, found: Findings) -> None:
    size = f"{4 * parameters / 1e6:.0f} MB of gradients"
    if here.size > 1:
        seconds = _all_reduce(parameters, here.device, REDUCE)
        seconds = max(here.gather(seconds))
        found.rows.append(
            ("all-reduce", f"{size} in {1000 * seconds:.1f} ms alone; {waiting:.0%} of a step waits for it")
        )
        return
    seconds = _two_processes(parameters)
    words = f"two processes did not answer within {PATIENCE:.0f} s"
    if seconds is not None:
        words = f"{size} in {1000 * seconds:.1f} ms between two gloo processes here"
    found.rows.append(("all-reduce", words))


def _all_reduce(parameters: int, device: torch.device, budget: float) -> float:
    """Seconds for one all-reduce of `parameters` float32 over the default group; every rank calls it."""
    gradients = torch.ones(parameters, device=device)

    def once() -> float:
        began = time.perf_counter()
        dist.all_reduce(gradients)
        gradients[0].item()  # waits for the device
        gradients.fill_(1)
        return time.perf_counter() - began

    once()
    # All ranks must do as many: the slowest decides.
    first = torch.tensor([once()], device=device)
    dist.all_reduce(first, op=dist.ReduceOp.MAX)
    times = [once() for _ in range(max(1, min(20, int(budget / first.item()))))]
    return sorted(times)[len(times) // 2]


def _two_processes(parameters: int) -> float | None:
    """The same between two processes of this machine, None where they cannot be had."""
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_one_of_two, args=(rank, folder, parameters), daemon=True) for rank in (0, 1)]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + PATIENCE
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        try:
            return float((Path(folder) / "seconds").read_text())
        except (OSError, ValueError):
            return None


def _one_of_two(rank: int, folder: str, parameters: int) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    seconds = _all_reduce(parameters, torch.device("cpu"), REDUCE / 2)
    if rank == 0:
        (Path(folder) / "seconds").write_text(str(seconds))
    dist.barrier()
    dist.destroy_process_group()


def _predict(
    config: Config, data: DataSet, plan: Plan, here: World, found: Findings, rates: tuple[float | None, float, float]
) -> None:
    """How long an epoch and the run will take; on a CPU loader and step share the cores, elsewhere they overlap."""
    loader, step, waiting = rates
    shared = here.device.type == "cpu"
    rate = _together(loader, step, shared=shared)
    evaluating = _together(loader, 3 * step, shared=shared)  # a third of the products: no backward pass
    training = plan.samples / rate
    seconds = len(data.val) / evaluating if data.val is not None else 0.0
    every = config.loop.eval_every
    times = math.ceil(plan.epochs / every) if every and data.val is not None else 0
    found.rows.append(("an epoch", f"{duration(training)} at {_rate(rate)}, an evaluation {duration(seconds)}"))
    found.rows.append(("the run", f"{duration(plan.epochs * training + times * seconds)} predicted"))
    found.rows.append(("bound", _bound(config, here, loader, step, waiting)))


def _together(loader: float | None, step: float, *, shared: bool) -> float:
    """Images a second of a loader and a step, each known alone; `shared`: they take turns on the same cores."""
    if loader is None:
        return step
    return 1 / (1 / loader + 1 / step) if shared else min(loader, step)


def _rate(images: float) -> str:
    return f"{images:,.0f} images/s" if images >= 10 else f"{images:.2g} images/s"


def _bound(config: Config, here: World, loader: float | None, step: float, waiting: float) -> str:
    if loader is not None and loader < step:
        threads = config.data.threads or min(here.cores, 8)
        needed = math.ceil(threads * step / loader)
        if needed <= here.cores:
            return f"input: data.threads={needed} would do, if decoding goes on scaling with threads"
        smaller = "re-encode the images to a smaller short side (prepare --short-side), or give ranks more cores"
        return f"input: that takes {needed} threads a rank, and it has {here.cores} cores: {smaller}"
    if waiting > COMMUNICATION:
        return f"communication: {waiting:.0%} of a step waits for gradients; a larger batch a rank would help"
    return "compute, as it should be"
