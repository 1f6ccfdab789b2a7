"""From a config and a profile to a job in the queue, with everything it needs frozen beside it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import submitit

from launch import attempt, queue, script, snapshot, state
from launch.job import Job
from launch.profile import Profile
from launch.record import Launch, Submitted, fresh_folder
from trainer import configfile
from trainer.config import Config, ConfigError
from trainer.plan import Plan
from trainer.report.folder import RunFolder
from trainer.study import records

FOREVER = 1_000_000  # submitit's own count of restarts; ours goes by progress
Sent = TypeVar("Sent")


@dataclass(frozen=True)
class Order:
    """What is to be run where."""

    configs: list[Config]  # one; several are an array
    profile: Profile
    nodes: int
    home: Path  # the run's folder, or the sweep's
    limit: int = 1  # an array's tasks at a time

    @property
    def ranks(self) -> int:
        return self.nodes * self.profile.tasks_per_node

    @property
    def runs(self) -> list[str]:
        return [config.output_dir for config in self.configs]

    def launch(self) -> Launch:
        return Launch(fresh_folder(self.home), self.runs, self.nodes, self.ranks, self.profile.max_restarts)


def load(path: str, overrides: list[str]) -> Config:
    """A config with its paths made absolute: a job does not run where it was submitted."""
    config = configfile.load(path, overrides)
    absolute = {"output_dir": config.output_dir, "data.root": config.data.root, "model.weights": config.model.weights}
    fixed = [f"{key}={Path(value).absolute()}" for key, value in absolute.items() if value is not None]
    return configfile.load(path, [*overrides, *fixed])


def check(order: Order) -> None:
    """ConfigError for what could never run, before anything is written."""
    if order.nodes < 1:
        raise ConfigError(f"--nodes {order.nodes}: use 1 or more")
    for config in order.configs:
        if config.device == "cuda" and not order.profile.gpus_per_node:
            raise ConfigError("device=cuda, and the profile has gpus_per_node=0: use device=auto or another profile")
        synthetic = config.data.source == "synthetic"
        samples = config.data.synthetic_samples if synthetic else max(config.global_batch_size, 1_281_167)
        Plan.of(config, order.ranks, samples)
    for run in order.runs:
        if (Path(run) / "launch" / "job.json").exists():
            _refuse_live(Submitted.of(Path(run)))


def finished(order: Order) -> bool:
    """Whether the run has been trained to the end of what its config asks for."""
    return records.finished(order.configs[0])


def freeze(order: Order) -> Path:
    """Freeze code and config for a job that somebody else submits; returns the launch's folder."""
    return _with(order, order.launch(), lambda written: written.folder)


def dry_run(order: Order) -> str:
    """The batch script and the resolved config of the first run."""
    launch = order.launch()
    text = script.text(order.profile, launch, script.job_name(order.home), _limit(order))
    return f"{text}\n\n# {launch.config(0)}\n{configfile.to_yaml(order.configs[0])}"


def submit(order: Order) -> list[Submitted]:
    """Put it into the queue; ConfigError, and nothing left behind, if SLURM will not have it."""
    launch, name = order.launch(), script.job_name(order.home)
    asked = f"{order.nodes} nodes with {order.profile.tasks_per_node} ranks each (partition={order.profile.partition})"
    queue.demand_possible(script.text(order.profile, launch, name, _limit(order)), asked)
    return _with(order, launch, lambda written: _sbatch(order, written, name))


def run_here(order: Order) -> int:
    """Run the same job on this machine, to its end; returns an exit status."""
    launch = order.launch()
    executor = submitit.LocalExecutor(launch.submitit, python=script.python(order.profile, launch))
    executor.update_parameters(
        timeout_min=order.profile.minutes,
        gpus_per_node=order.profile.gpus_per_node,
        tasks_per_node=order.profile.tasks_per_node,
        signal_delay_s=order.profile.signal_delay,
    )
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(attempt.free_port(20000 + os.getpid() % 20000))}
    os.environ.update({**meeting, **order.profile.environment})
    job = _with(order, launch, lambda written: executor.submit(Job(str(written.folder))))
    print(f"{launch.log(0, 0, 0)} says how it goes", flush=True)
    job.wait()
    summary = RunFolder(order.home).read("summary.json") or {}
    print(f"{summary.get('status', 'failed')} {order.home}")
    return 0 if summary.get("status") == "done" else 1


def _sbatch(order: Order, launch: Launch, name: str) -> list[Submitted]:
    executor = submitit.SlurmExecutor(launch.submitit, FOREVER, python=script.python(order.profile, launch))
    executor.update_parameters(**script.parameters(order.profile, launch, name))
    jobs = [Job(str(launch.folder), index) for index in range(len(order.runs))]
    if len(jobs) == 1:
        numbers = [executor.submit(jobs[0]).job_id]
    else:
        executor.update_parameters(**script.parameters(order.profile, launch, name), array_parallelism=order.limit)
        with executor.batch():
            pending = [executor.submit(job) for job in jobs]
        numbers = [job.job_id for job in pending]
    submitted = [Submitted(Path(run), number, launch, i) for i, (run, number) in enumerate(zip(order.runs, numbers))]
    for entry in submitted:
        entry.write()
    return submitted


def _with(order: Order, launch: Launch, send: Callable[[Launch], Sent]) -> Sent:
    """Write the launch down, and send it; nothing of it stays if that fails."""
    new = [Path(folder) for folder in dict.fromkeys([str(order.home), *order.runs]) if not Path(folder).exists()]
    try:
        record = snapshot.take(launch.code)
        launch = Launch(**{**vars(launch), **record})
        launch.write(order.profile, order.configs)
        launch.submitit.mkdir(exist_ok=True)  # submitit may have made it
        for run in order.runs:
            (Path(run) / "launch").mkdir(parents=True, exist_ok=True)
            (Path(run) / "launch" / "cancel").unlink(missing_ok=True)
        return send(launch)
    except (OSError, submitit.core.utils.FailedJobError) as error:
        shutil.rmtree(launch.folder, ignore_errors=True)
        for folder in new:
            shutil.rmtree(folder, ignore_errors=True)
        raise ConfigError(f"{order.home} is not submitted: {' '.join(str(error).split())}") from error


def say(order: Order, submitted: list[Submitted]) -> None:
    """What was submitted, and what to do next."""
    first = submitted[0]
    job = first.job if len(submitted) == 1 else f"{first.job.split('_')[0]} (an array of {len(submitted)})"
    print(f"job {job}: {order.nodes} nodes x {order.profile.tasks_per_node} ranks, {order.home}")
    missed = snapshot.untracked()
    if missed:
        print(f"warning: not in the job, because git does not track it: {', '.join(missed[:5])}", file=sys.stderr)
    print(f"python -m launch status {order.home}")


def _limit(order: Order) -> int | None:
    return order.limit if len(order.configs) > 1 else None


def _refuse_live(before: Submitted) -> None:
    found = state.of(before)
    if found.live:
        raise ConfigError(
            f"{before.run} is job {before.job} already ({found.name}): wait for it, or "
            f"python -m launch cancel {before.run}"
        )
