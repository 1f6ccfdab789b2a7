"""What reporting costs: the same run with W&B and all else on, and with `report.wandb=disabled`, in turn.

    python benchmarks/wandb_steps.py [--blocks 5] [--steps 300] [key=value ...]

Runs are processes of their own: a baseline between any two others, which are W&B offline at log_every=50 and at
log_every=1, and online with a server (tests/wandb_server.py) that hangs from the moment the run has begun there. A run
saves every 100 steps, so rows reach W&B while it trains. Compared is the time of a step without warm-up, as the run
itself finds it (`images_per_second` of summary.json), each against the baselines before and after it.

"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = """
data: {source: synthetic, image_size: 32, synthetic_samples: 12800, synthetic_classes: 10}
model: {name: resnet20}
schedule: {epochs: 1000, warmup_epochs: 0}
precision: {amp: fp32}
global_batch_size: 128
checkpoint: {every_steps: 100}
loop: {eval_every: 0}
"""
VARIANTS = {
    "baseline": ["report.wandb=disabled", "report.log_every=50"],
    "W&B, log_every=50": ["report.wandb=offline", "report.log_every=50"],
    "W&B, log_every=1": ["report.wandb=offline", "report.log_every=1"],
    "W&B online, hanging": ["report.wandb=online", "report.log_every=1"],
}


@contextmanager
def hanging_server() -> Iterator[dict[str, str]]:
    """The environment of a client of a server that hangs as soon as it knows a run."""
    sys.path.append(str(REPOSITORY / "tests"))
    from wandb_server import HANGING, wandb_server

    with wandb_server() as server:

        def watch() -> None:
            while not server.runs:
                time.sleep(0.1)
            server.fail = HANGING

        threading.Thread(target=watch, daemon=True).start()
        yield {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40, "WANDB_ERROR_REPORTING": "false"}


def step_seconds(steps: int, options: list[str]) -> float:
    """Seconds a step of one run."""
    with (
        hanging_server() if "report.wandb=online" in options else nullcontext({}) as environment,
        tempfile.TemporaryDirectory() as folder,
    ):
        (Path(folder) / "config.yaml").write_text(CONFIG)
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "trainer", "train", f"{folder}/config.yaml", f"output_dir={run}"]
        command += [f"loop.max_steps={steps}", *options]
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, env=os.environ | environment)
        images = json.loads((run / "summary.json").read_text())["images_per_second"]
        batch = json.loads((run / "run.json").read_text())["plan"]["global_batch"]
        return batch / images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the config: model.name=resnet50")
    options = parser.parse_args()
    names, baseline = list(VARIANTS)[1:], VARIANTS["baseline"]
    ratios: dict[str, list[float]] = {name: [] for name in names}
    before = step_seconds(options.steps, [*options.overrides, *baseline])
    bases = [before]
    for _ in range(options.blocks):
        for name in names:
            found = step_seconds(options.steps, [*options.overrides, *VARIANTS[name]])
            after = step_seconds(options.steps, [*options.overrides, *baseline])
            ratios[name].append(found / ((before + after) / 2))
            before = after
            bases.append(after)
    drift = [later / earlier for earlier, later in itertools.pairwise(bases)]  # what the machine does by itself
    rows = {**ratios, "baseline against the one before": drift}
    print(f"step of the baseline: {1000 * statistics.median(bases):.2f} ms")
    for name, values in rows.items():
        print(f"{name:<32} {statistics.median(values):.4f} ({min(values):.4f} to {max(values):.4f})")
    medians = {name: round(statistics.median(values), 4) for name, values in rows.items()}
    print(json.dumps({"step_ms": round(1000 * statistics.median(bases), 2), "ratio": medians}))


if __name__ == "__main__":
    main()
