"""What every rank of a job runs: the frozen config, in the frozen code, with its output in a log of its own.

    torchrun ... -m launch.job LAUNCH       (slurm/train.sbatch; submitit calls a `Job`)

A rank exits with the trainer's status, save that after an agreed stop only rank 0 does: srun is told to kill the step
when a rank fails, and rank 0 may still be writing the checkpoint when the others are done.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launch import affinity
from launch.record import Launch
from trainer import environment
from trainer.environment import Place

MISTAKE, STOPPED = 2, 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)


@dataclass(frozen=True)
class Job:
    """What submitit pickles: where everything lies, and nothing that a requeue would have to bring up to date."""

    launch: str
    index: int = 0

    def __call__(self) -> None:
        # submitit's own handlers requeue at once; the trainer's, which only set a flag, follow in a moment.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if status := run(Path(self.launch), self.index):
            sys.exit(status)


def run(folder: Path, index: int) -> int:
    """Train run `index` of the launch at `folder` on this rank; returns the exit status."""
    _take_local_place()
    launch, place = Launch.read(folder), environment.place()
    attempt = int(os.environ.get("LAUNCH_ATTEMPT", "0"))
    _log_into(launch.log(index, attempt, place.rank))
    profile = launch.profile()
    alone = "RANK" not in os.environ  # a task a rank; torchrun has all of a node's ranks in one
    bound = _bind(place, profile.cpus_per_rank) if profile.numa and alone else None
    print(
        f"rank {place.rank} of {place.size}, local {place.local_rank}, node {os.environ.get('SLURMD_NODENAME')}, "
        f"job {os.environ.get('SLURM_JOB_ID')}, attempt {attempt}, cores {bound or len(os.sched_getaffinity(0))}, "
        f"{time.strftime('%Y-%m-%d %H:%M:%S')}",
        flush=True,
    )
    arguments = ["train", str(launch.config(index))]
    if profile.scratch:
        arguments.append(f"data.stage_to={os.path.expandvars(profile.scratch)}")
    from trainer.__main__ import main

    status = main(arguments)
    if status == MISTAKE:
        (folder / f"mistake-{index}-{attempt}").touch()
    return 0 if status == STOPPED and place.rank else status


def _take_local_place() -> None:
    """submitit's local executor has variables of its own."""
    names = {"RANK": "GLOBALID", "LOCAL_RANK": "LOCALID", "WORLD_SIZE": "NTASKS", "LOCAL_WORLD_SIZE": "NTASKS"}
    if os.environ.get("SUBMITIT_EXECUTOR") == "local":
        os.environ.update({ours: os.environ[f"SUBMITIT_LOCAL_{theirs}"] for ours, theirs in names.items()})


def _bind(place: Place, cores: int | None) -> list[int] | None:
    chosen = affinity.bind(place.local_rank, place.local_size, cores)
    if chosen:
        os.environ["SLURM_CPUS_PER_TASK"] = str(len(chosen))  # what the trainer sizes its threads by
    return chosen


def _log_into(path: Path) -> None:
    """Send all output of this process, C libraries' too, to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), int(os.environ.get("LAUNCH_INDEX", "0"))))
