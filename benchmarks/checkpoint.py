"""What a save costs training, and a resume the start: ResNet-50 with momentum, 205 MB, on the CPU.

    python benchmarks/checkpoint.py [FOLDER] [--rounds 9]

Each round times an inline `torch.save` with fsync and then our save: how long the training thread is held up (the call
itself, and the wait before the next update of the weights, after a forward and backward pass of BATCH images), and the
CPU time of the thread that copies, writes, checksums and syncs behind its back. The ratios are of medians of one run.
What a save takes from training beside the stall is counted as that CPU time, shared by all cores. A resume is the
lock, the checksum, the load into network and optimiser, against a bare `torch.load` of the same state. Prints one JSON
object. FOLDER should lie on the disk that runs are kept on (default: a temporary folder).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from trainer import checkpoint
from trainer.config import Model
from trainer.distributed import World
from trainer.loop import Learner
from trainer.models import build
from trainer.report.folder import RunFolder
from trainer.saver import Saver
from trainer.state import RunState

MINUTE, BATCH = 60.0, 4


def trained() -> RunState:
    """ResNet-50 after one step of SGD with momentum, on random gradients."""
    model = build.create(Model(name="resnet50"), 1000).to(memory_format=torch.channels_last)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    learner = Learner(
        model=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        lr_at=lambda step: 0.1,
        device=torch.device("cpu"),
    )
    return RunState(learner, World(0, 0, 1, 1, torch.device("cpu")))


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    work()
    return clock() - began


def inline(state: dict, path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def saving(run: RunState, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds by what they were spent on, one a round; the first save of a run is apart."""
    state, still = run.state_dict(run.gather()), run.still()
    images = torch.randn(BATCH, 3, 224, 224).contiguous(memory_format=torch.channels_last)

    def stall(saver: Saver, step: int) -> float:
        held = seconds(lambda: saver.save(step, state, still=still))
        run.model(images).sum().backward()
        return held + seconds(saver.settle)

    def written(step: int) -> None:
        saver.save(step, state, still=still)
        saver.finish()

    saver = Saver(folder / "checkpoints", 2, checkpoint.always)
    cold = Saver(folder / "cold", 2, checkpoint.always)
    spent: dict[str, list[float]] = {"inline": [], "stall": [], "background_cpu": []}
    spent["first_stall_unreserved"] = [stall(cold, 1)]
    cold.finish()
    saver.reserve(run.bulk)
    saver.close()
    spent["first_stall"] = [stall(saver, 1)]
    saver.finish()
    for step in range(2, rounds + 2):
        spent["inline"].append(seconds(lambda: inline(state, folder / "inline.pt")))
        spent["stall"].append(stall(saver, step))
        saver.finish()
        spent["background_cpu"].append(seconds(lambda step=step: written(step), time.process_time))
    return spent


def resuming(run: RunState, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of a resume from the newest checkpoint in `folder`, and of a bare torch.load; files in the page cache."""
    spent: dict[str, list[float]] = {"resume": [], "bare_load": []}

    def resume() -> None:
        held = RunFolder(folder)
        held.acquire()
        newest = checkpoint.newest_whole(held.checkpoints, run.demand_fit)
        run.load_state_dict(checkpoint.load(newest))
        held.release()

    def bare() -> None:
        state = torch.load(folder / "inline.pt", weights_only=True)
        run.model.load_state_dict(state["model"])
        run.learner.optimizer.load_state_dict(state["optimizer"])

    for _ in range(rounds):
        spent["resume"].append(seconds(resume))
        spent["bare_load"].append(seconds(bare))
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    run = trained()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        spent = saving(run, Path(folder), options.rounds) | resuming(run, Path(folder), options.rounds)
        size = (Path(folder) / "inline.pt").stat().st_size
    median = {name: statistics.median(values) for name, values in spent.items()}
    cores = len(os.sched_getaffinity(0))
    result = {
        "megabytes": round(size / 1e6, 1),
        "stall_over_inline": round(median["stall"] / median["inline"], 4),
        "first_stall_over_inline": round(median["first_stall"] / median["inline"], 4),
        "cost_at_one_a_minute": round((median["stall"] + median["background_cpu"] / cores) / MINUTE, 5),
        "resume_seconds": round(median["resume"], 3),
        "resume_over_bare_load": round(median["resume"] / median["bare_load"], 2),
        "median_seconds": {name: round(value, 4) for name, value in median.items()},
        "spread_seconds": {name: [round(min(v), 4), round(max(v), 4)] for name, v in spent.items()},
        "cores": cores,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
