"""A real SLURM of two nodes on this machine, and what tests do to the jobs on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import REPOSITORY, Finished

from trainer import checkpoint

SCRIPT = REPOSITORY / "slurm" / "test_cluster.sh"
PATIENCE = 600  # seconds for whatever includes the start of four ranks, on a machine that others use too


def until(condition: Callable[[], object], what: str, patience: float = PATIENCE, every: float = 0.1) -> object:
    """The first true value of `condition`; an AssertionError that says `what` after `patience` seconds."""
    began = time.monotonic()
    while not (value := condition()):
        assert time.monotonic() - began < patience, f"not within {patience} s: {what}"
        time.sleep(every)
    return value


@dataclass
class Cluster:
    """The cluster of slurm/test_cluster.sh. Node names as SLURM knows them."""

    folder: Path
    port: int  # the first of 20 that it takes
    nodes: list[str]

    @classmethod
    def start(cls, folder: Path, port: int) -> Cluster:
        cluster = cls(folder, port, [])
        cluster.script("start")
        cluster.nodes = sorted(cluster.slurm("sinfo", "-h", "-N", "-p", "gpu", "-o", "%N").split())
        return cluster

    def environment(self, **more: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1"} | more

    def script(self, *arguments: str, **more: str) -> str:
        environment = self.environment(SLURM_TEST_DIR=str(self.folder), BASE_PORT=str(self.port), **more)
        done = subprocess.run([str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def slurm(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def launch(self, *arguments: object, code: Path = REPOSITORY) -> Finished:
        """Run `python -m launch ARGUMENTS` from the checkout at `code`."""
        command = [sys.executable, "-m", "launch", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=code, env=self.environment(), capture_output=True, text=True, timeout=PATIENCE
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def state(self, job: str) -> str:
        return self.slurm("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def take_nodes(self, seconds: int) -> str:
        """A job of the partition that preempts ours, on both nodes."""
        command = ["sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "-t", "5"]
        return self.slurm(*command, "--wrap", f"sleep {seconds}").strip()


@dataclass
class Submission:
    """A run on the cluster."""

    cluster: Cluster
    run: Path

    @property
    def job(self) -> str:
        return json.loads((self.run / "launch" / "job.json").read_text())["job"]

    @property
    def state(self) -> str:
        return self.cluster.state(self.job)

    def events(self, kind: str) -> list[dict]:
        path = self.run / "launch" / "attempts.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in map(json.loads, lines) if line["event"] == kind]

    def step(self) -> int:
        """The last step written to metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines()[:-1] if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def status(self) -> dict[str, str]:
        """The row of `python -m launch status`, by column."""
        shown = self.cluster.launch("status", self.run)
        heading, row = shown.output.splitlines()
        starts = [heading.index(name) for name in heading.split()]
        ends = [*starts[1:], None]
        return {name: row[a:b].strip() for name, a, b in zip(heading.split(), starts, ends)}

    def ranks(self) -> dict[int, int]:
        """The process of each rank that is alive, by rank."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                command = (path / "cmdline").read_bytes()
                variables = dict(v.split(b"=", 1) for v in (path / "environ").read_bytes().split(b"\0") if b"=" in v)
            except OSError:
                continue
            ours = str(self.run).encode() in command and b"submitit.core._submit" in command and b"srun" not in command
            if ours and b"SLURM_PROCID" in variables and b"SLURM_STEP_ID" in variables:
                found[int(variables[b"SLURM_PROCID"])] = int(path.name)
        return found

    def freeze(self, step: int) -> dict[int, int]:
        """Stop every rank's process at or after `step`; SLURM wakes them with the signal that it sends."""
        until(lambda: self.step() >= step, f"step {step} of {self.run}", every=0.02)
        ranks = self.ranks()
        for process in ranks.values():
            os.kill(process, signal.SIGSTOP)
        assert len(ranks) == 4 and not self.events("end"), "it had ended already: more steps are needed"
        return ranks

    def thaw_when_signalled(self, ranks: dict[int, int], number: int) -> None:
        """Wake the ranks as soon as `number` waits for each of them."""

        def waits(process: int) -> bool:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
            masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
            return any(mask >> (number - 1) & 1 for mask in masks)

        until(lambda: all(waits(process) for process in ranks.values()), f"signal {number}")
        self.thaw(ranks)

    def thaw(self, ranks: dict[int, int]) -> None:
        for process in ranks.values():
            os.kill(process, signal.SIGCONT)

    def ended(self, state: str) -> None:
        """Wait for the job to end, in `state`."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        reached = until(lambda: self.state in final and self.state, f"the end of job {self.job}", every=0.5)
        assert reached == state, self.said()

    def said(self) -> str:
        """What the job and rank 0 said, for a failing test."""
        logs = sorted(self.run.glob("launch/*/submitit/*_0_log.out")) + sorted(
            self.run.glob("launch/*/logs/0/*/*0.log")
        )
        return "\n".join(f"==> {path}\n{path.read_text()[-3000:]}" for path in logs)

    def weights(self) -> dict[str, torch.Tensor]:
        return checkpoint.load(checkpoint.newest_whole(self.run / "checkpoints"))["model"]


def same(ours: Submission, theirs: Submission) -> None:
    """Both runs ended with bitwise the same weights and told of every step once."""
    learnt = ours.weights()
    for name, tensor in theirs.weights().items():
        assert torch.equal(learnt[name], tensor), name
    for run in (ours.run, theirs.run):
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        steps = [record["step"] for record in records if record["kind"] == "train"]
        assert steps == list(range(1, len(steps) + 1)), f"{run}: {steps}"
