"""What reporting costs a run: the CPU time that the training thread spends on it, as a share of all that it spends.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/reporting.py [FOLDER] [--steps 200] [--every 10]

Trains ResNet-20 at 32 px on synthetic images with everything on (records every EVERY steps, an epoch's end and its
page every 50 steps, events, W&B offline, live figures), and counts what the training thread's calls into trainer/report
and trainer/tally.py take, by the CPU clock of that thread, which other work on the machine does not move. So the
figures are microseconds a step and do not depend on how fast a step is; the shares are of this small network's step,
and of steps of 10 and 100 ms. The hook that times the reduction is measured by itself, on a graph of one product.
Prints one JSON object. FOLDER is where the run goes (default: a temporary folder).
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
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from trainer.__main__ import main as trainer
from trainer.exposed import Backward
from trainer.report import drawing
from trainer.report.reporter import Reporter
from trainer.tally import Tally

STEP_CALLS = [(Reporter, "step"), (Reporter, "train"), (Tally, "add"), (Tally, "cut")]
EPOCH_CALLS = [(Reporter, "epoch"), (Reporter, "saved"), (Reporter, "pause"), (Tally, "pause")]


def counted(kind: type, name: str, spent: dict[str, list[float]]) -> None:
    """Have `kind.name` add the thread's CPU seconds of each call to `spent`."""
    inner: Callable[..., Any] = getattr(kind, name)

    def call(*arguments: Any, **named: Any) -> Any:
        began = time.thread_time()
        try:
            return inner(*arguments, **named)
        finally:
            spent.setdefault(f"{kind.__name__}.{name}", []).append(time.thread_time() - began)

    setattr(kind, name, call)


def hook() -> float:
    """CPU seconds that timing the reduction adds to a backward pass; the median of 9 rounds."""
    weight = torch.ones(8, requires_grad=True)
    device = torch.device("cpu")

    def seconds(reduces: bool) -> float:
        began = time.thread_time()
        for _ in range(2000):
            Backward(device, int)((weight * 2).sum(), reduces=reduces)
        return (time.thread_time() - began) / 2000

    return statistics.median(seconds(True) - seconds(False) for _ in range(9))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=10)
    options = parser.parse_args()
    spent: dict[str, list[float]] = {}
    for kind, name in [*STEP_CALLS, *EPOCH_CALLS, (drawing.Drawing, "_draw")]:
        counted(kind, name, spent)
    with tempfile.TemporaryDirectory() as temporary, redirect_stdout(sys.stderr):
        folder = options.folder or Path(temporary)
        (folder / "reporting.yaml").write_text("{}")
        given = ["data.source=synthetic", "data.synthetic_samples=1600", "data.synthetic_classes=10"]
        given += ["data.image_size=32", "model.name=resnet20", "global_batch_size=32", "precision.amp=fp32"]
        given += [f"schedule.epochs={options.steps / 50}", "schedule.warmup_epochs=1", "loop.eval_every=0"]
        given += [f"report.log_every={options.every}", f"output_dir={folder / 'run'}", "report.wandb=offline"]
        began = time.thread_time()
        status = trainer(["train", str(folder / "reporting.yaml"), *given])
        whole = time.thread_time() - began
        page = (folder / "run" / "report.html").stat().st_size
    names = [f"{kind.__name__}.{name}" for kind, name in STEP_CALLS]
    every_step = sum(sum(spent.get(name, [])) for name in names) / options.steps + hook()
    at_epochs = sum(sum(spent.get(f"{k.__name__}.{n}", [])) for k, n in EPOCH_CALLS) / options.steps
    found = {
        "microseconds_a_step": {
            name: round(1e6 * sum(times) / options.steps, 1) for name, times in sorted(spent.items())
        },
        "microseconds_of_the_reduction_timer": round(1e6 * hook(), 1),
        "microseconds_a_step_in_all": round(1e6 * (every_step + at_epochs), 1),
        "share_of_this_run": round((every_step + at_epochs) * options.steps / whole, 5),
        "share_of_a_10_ms_step": round((every_step + at_epochs) / 0.010, 5),
        "share_of_a_100_ms_step": round((every_step + at_epochs) / 0.100, 5),
        "page": {
            "milliseconds_of_another_thread": round(1e3 * statistics.median(spent["Drawing._draw"]), 1),
            "bytes": page,
        },
        "log_every": options.every,
        "steps": options.steps,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    print(json.dumps(found))
    return status


if __name__ == "__main__":
    sys.exit(main())
