"""Many ranks on one machine: do start-up, steady state and shutdown work, and what memory does a rank take.

    python benchmarks/many_ranks.py [--ranks 8 16 32] [--steps 60] [--gradients fp32|bf16] [--out FILE]

Real processes under torchrun, gloo, one thread each, train ResNet-20 at 16 px on synthetic images, two a rank; the run
must end as done with all its steps. A rank's memory is read from /proc in the middle of the run: RSS counts the pages
that ranks share (torch's code) in each of them, PSS their share of it. Where there are more ranks than cores, times say
only that it works. Prints one JSON object; --out writes it, with where and when.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

EVERY = 5  # steps a record
PATIENCE = 1800.0
CONFIG = """
device: cpu
data: {source: synthetic, synthetic_classes: 10, image_size: 16}
model: {name: resnet20}
optim: {lr: 0.01}
schedule: {name: constant, epochs: 1, warmup_epochs: 0}
loop: {eval_every: 0}
report: {wandb: disabled}
"""


class Failed(RuntimeError):
    """The ranks did not do what they were asked to."""


def run(ranks: int, steps: int, folder: Path, gradients: str = "fp32") -> dict:
    """Train `steps` steps with `ranks` ranks in `folder`; what it took. Raises Failed."""
    (folder / "many.yaml").write_text(CONFIG)
    given = [f"output_dir={folder / 'run'}", f"global_batch_size={2 * ranks}", f"loop.max_steps={steps}"]
    given += [f"report.log_every={EVERY}", f"distributed.gradients={gradients}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    began = time.time()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "-m", "trainer", "train", str(folder / "many.yaml"), *given],
            cwd=REPOSITORY,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            memory, first = _watched(process, folder / "run" / "metrics.jsonl", ranks, began)
            status = process.wait(PATIENCE)
        except (subprocess.TimeoutExpired, Failed) as error:
            raise Failed(f"{error}\n{_tail(folder / 'log')}") from error
        finally:
            _end(process)
    ended = time.time()
    if status:
        raise Failed(f"torchrun ended with {status}\n{_tail(folder / 'log')}")
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "run" / "summary.json").read_text())
    if summary["status"] != "done" or summary["steps"] != steps:
        raise Failed(f"the run is {summary['status']} after {summary['steps']} of {steps} steps")
    timed = [record["step_seconds"] for record in records if record["step_seconds"] is not None]
    return {
        "ranks": ranks,
        "seconds_to_the_first_record": round(first - began, 2),  # of EVERY steps
        "milliseconds_a_step": round(1000 * statistics.median(timed), 2) if timed else None,
        # The last save and what follows it; file times, so that it does not matter when we look.
        "seconds_from_the_last_record_to_the_end": round(ended - _last_record(folder / "run"), 2),
        "seconds": round(ended - began, 2),
        "megabytes_of_a_rank": {
            kind: {"median": round(statistics.median(found), 1), "most": round(max(found), 1)}
            for kind, found in memory.items()
        },
        "megabytes_of_all": round(sum(memory["pss"]), 1),
    }


def _last_record(run: Path) -> float:
    return (run / "metrics.jsonl").stat().st_mtime


def _watched(
    process: subprocess.Popen, metrics: Path, ranks: int, began: float
) -> tuple[dict[str, list[float]], float]:
    """(MB of every rank after some records, the time of the first one)."""
    first = None
    while time.time() < began + PATIENCE:
        if process.poll() is not None:
            raise Failed(f"torchrun ended with {process.returncode} before its ranks were at work")
        seen = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        if seen and first is None:
            first = metrics.stat().st_mtime
        if seen >= 2:
            found = [memory(pid) for pid in children(process.pid)]
            found = [each for each in found if each is not None]
            if len(found) != ranks:
                raise Failed(f"{len(found)} of {ranks} ranks are there")
            return {kind: [each[kind] for each in found] for kind in ("rss", "pss")}, first
        time.sleep(0.05)
    raise Failed(f"no record after {PATIENCE:g} s")


def children(pid: int) -> list[int]:
    """The processes that process `pid` has started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            found += [int(number) for number in (task / "children").read_text().split()]
    return found


def memory(pid: int) -> dict[str, float] | None:
    """MB of a process that are there (rss), and that it shares with none or in part (pss); None if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0].lower(): int(line.split()[1]) * 1024 / 1e6 for line in lines if line.endswith(" kB")}
    return {"rss": sizes["rss"], "pss": sizes["pss"]}


def _end(process: subprocess.Popen) -> None:
    """Leave none of our processes behind."""
    for pid in [*children(process.pid), process.pid] if process.poll() is None else []:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-80:])


def main() -> None:
    from about import about

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--gradients", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = about() | {"gradients": options.gradients, "steps": options.steps, "runs": []}
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            result["runs"].append(run(ranks, options.steps, Path(folder), options.gradients))
        print(json.dumps(result["runs"][-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
