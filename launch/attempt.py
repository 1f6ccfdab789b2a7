"""The beginning and the end of an attempt, called by the batch script: where the ranks meet, and whether to come back.

Standard library only, run as a file (`python3 -I CODE/launch/attempt.py begin LAUNCH`): with a container, only the host
has `scontrol`, and its Python may have nothing else. `decide` is what the whole launcher turns on.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MISTAKE, STOPPED, EXHAUSTED = 2, 75, 70  # exit statuses; the first two are the trainer's
DONE, REQUEUE, WAIT, STOP = "done", "requeue", "wait", "stop"  # verdicts
UNSURE = "unsure"  # not yet one: `claimed` tells which of the others it is
CLAIM_S, LOOK_S = 60, 5  # how long the queue may take to end a job whose ranks it has signalled, and between looks


@dataclass(frozen=True)
class Ending:
    """What is known when the ranks are gone."""

    status: int  # of srun: the highest of the ranks'
    job_state: str = "RUNNING"  # the queue's
    preempted: bool = False
    cancelled: bool = False  # by `launch cancel`
    mistake: bool = False  # a rank met a ConfigError
    signal: str | None = None  # that the ranks agreed to stop for
    failed_step: int | None = None  # where the trainer says that it failed
    failed_before: int | None = None  # where the attempt before failed
    idle_restarts: int = 0  # attempts in a row, this one included, that brought no new saved step
    max_restarts: int = 3


def decide(end: Ending) -> tuple[str, str]:
    """(verdict, reason): done, requeue, wait (the job stays until it is killed), stop, or unsure."""
    if end.status == 0:
        return DONE, "finished"
    if end.cancelled:
        return WAIT, "cancelled: it waits for scancel"
    if end.mistake or end.status == MISTAKE:
        return STOP, "a mistake in the config or the data, which coming back would only repeat"
    if end.job_state != "RUNNING":
        return WAIT, f"the queue is ending the job ({end.job_state}) and decides what follows"
    if end.status == STOPPED or end.signal:
        # A job that left by itself in the grace time of a preemption would not be requeued by SLURM.
        if end.signal in ("SIGTERM", "SIGINT") and not end.preempted:
            return UNSURE, f"stopped by {end.signal} after a save"
        return REQUEUE, f"stopped by {end.signal or 'a signal'} after a save"
    if end.failed_step is not None and end.failed_step == end.failed_before:
        return STOP, f"failed at step {end.failed_step} twice"
    if end.idle_restarts > end.max_restarts:
        return STOP, f"{end.max_restarts} restarts brought no new saved step (max_restarts={end.max_restarts})"
    return REQUEUE, f"failed with exit status {end.status}"


def claimed(
    facts: Callable[[], tuple[str, bool]], cancelled: Callable[[], bool], sleep: Callable[[float], None] = time.sleep
) -> tuple[str, str]:
    """(verdict, reason) on ranks that were stopped in a job that the queue says is running.

    A scancel shows in the job's state at once or soon. Where nobody ends the job within a minute it was a stray signal,
    such as a node's that was lost and comes back with orders of before, and the run must go on.

    Args:
        facts: the job's state and whether it is being preempted.
        cancelled: whether `launch cancel` was called.
    """
    for _ in range(CLAIM_S // LOOK_S):
        sleep(LOOK_S)
        state, preempted = facts()
        if preempted and state == "RUNNING":
            return REQUEUE, "the job is being preempted"
        if cancelled() or state != "RUNNING":
            return WAIT, f"the job is being ended ({'launch cancel' if cancelled() else state})"
    return REQUEUE, f"nobody has ended the job within {CLAIM_S} s"


class Record:
    """RUN/launch: one line an attempt begins or ends with, and who cancelled."""

    def __init__(self, run: Path, job: str) -> None:
        self.run, self.job = run, job
        self.folder = run / "launch"
        self.path = self.folder / "attempts.jsonl"

    def lines(self) -> list[dict[str, Any]]:
        """What was written of this job, oldest first."""
        return [line for line in read_lines(self.path) if line["job"] == self.job]

    def add(self, **facts: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps({"job": self.job, "time": time.time(), **facts}) + "\n")

    def begun(self) -> list[dict[str, Any]]:
        return [line for line in self.lines() if line["event"] == "begin"]

    def saved_step(self) -> int:
        """The newest checkpoint's step, 0 for none."""
        found = [int(p.parent.name) for p in (self.run / "checkpoints").glob("[0-9]" * 9 + "/manifest.json")]
        return max(found, default=0)

    def idle_restarts(self) -> int:
        """Attempts in a row that began at the step that is now the newest saved one."""
        now, count = self.saved_step(), 0
        for line in reversed(self.begun()):
            if line["step"] != now:
                break
            count += 1
        return count


def begin(launch: Path, index: int) -> int:
    """Write down that an attempt begins, and print the shell lines that tell the ranks where to meet."""
    facts = json.loads((launch / "launch.json").read_text())
    job = job_id()
    record = Record(Path(facts["runs"][index]), job)
    if (record.folder / "cancel").exists():
        print("cancelled before it began", file=sys.stderr)
        return STOPPED
    idle = record.idle_restarts()
    if idle > facts["max_restarts"]:
        reason = f"{idle - 1} restarts brought no new saved step (max_restarts={facts['max_restarts']})"
        record.add(event="end", attempt=len(record.begun()) - 1, verdict=STOP, reason=reason, status=EXHAUSTED)
        print(f"error: {reason}: see the logs, and submit again", file=sys.stderr)
        return EXHAUSTED
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    host = _first_host(nodes)
    if host is None:
        print(f"error: the first of the nodes {nodes} has no name that resolves, and no NodeAddr", file=sys.stderr)
        return 1
    attempt = len(record.begun())
    summary = _modified(record.run / "summary.json")
    record.add(event="begin", attempt=attempt, step=record.saved_step(), nodes=nodes, summary=summary)
    (record.folder / "job.json").write_text(json.dumps({"job": job, "launch": str(launch), "index": index}) + "\n")
    port = free_port(20000 + int(job.split("_")[0]) * 7 % 20000 + index)
    exports = {"MASTER_ADDR": host, "MASTER_PORT": port, "LAUNCH_ATTEMPT": attempt, "LAUNCH_INDEX": index}
    print("export " + " ".join(f"{name}={value}" for name, value in exports.items()))
    return 0


def end(launch: Path, index: int, status: int) -> int:
    """Write down how the attempt ended, and print the verdict for the batch script."""
    facts = json.loads((launch / "launch.json").read_text())
    record = Record(Path(facts["runs"][index]), job_id())
    started = record.begun()[-1]
    attempt, summary = started["attempt"], {}
    if _modified(record.run / "summary.json") != started["summary"]:
        summary = json.loads((record.run / "summary.json").read_text())
    failed = summary.get("steps") if summary.get("status") == "failed" else None
    before = [line for line in record.lines() if line["event"] == "end" and line["attempt"] == attempt - 1]
    state, preempted = job_facts(record.job)
    ending = Ending(
        status=status,
        job_state=state,
        preempted=preempted,
        cancelled=(record.folder / "cancel").exists(),
        mistake=(launch / f"mistake-{index}-{attempt}").exists(),
        signal=summary.get("signal") if summary.get("status") == "stopped" else None,
        failed_step=failed,
        failed_before=before[-1].get("failed_step") if before else None,
        idle_restarts=record.idle_restarts(),
        max_restarts=facts["max_restarts"],
    )
    verdict, reason = decide(ending)
    if verdict == UNSURE:
        verdict, more = claimed(lambda: job_facts(record.job), (record.folder / "cancel").exists)
        reason = f"{reason}; {more}"
    step = record.saved_step()
    record.add(
        event="end", attempt=attempt, step=step, status=status, failed_step=failed, verdict=verdict, reason=reason
    )
    print(f"attempt {attempt} ended at saved step {step}: {verdict}, {reason}", file=sys.stderr)
    print(verdict)
    return 0


def job_id() -> str:
    """This job as `scontrol requeue` wants it: an array's task by ARRAY_TASK, or all of the array would come back."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID", "0")


def job_facts(job: str) -> tuple[str, bool]:
    """(state, whether it is being preempted), as the controller says."""
    fields = dict(pair.split("=", 1) for pair in _scontrol("show", "job", "-o", job).split() if "=" in pair)
    preempted = fields.get("PreemptTime", "None") not in ("None", "Unknown")
    return fields.get("JobState", "RUNNING"), preempted


def free_port(first: int, tries: int = 1000) -> int:
    """A TCP port that nobody listens on here, from `first` on: jobs that share a node begin at different ones."""
    for port in range(first, first + tries):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue
    raise OSError(f"no free port from {first} to {first + tries}")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects; none where there is no file."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # cut short by a kill
    return found


def _first_host(nodes: str) -> str | None:
    """The name or address of the first node, where rank 0 runs; None where neither can be reached by name."""
    if not nodes:
        return "127.0.0.1"
    first = (_scontrol("show", "hostnames", nodes).split() or [nodes])[0]
    fields = dict(pair.split("=", 1) for pair in _scontrol("show", "node", "-o", first).split() if "=" in pair)
    for name in (first, fields.get("NodeAddr")):
        try:
            socket.getaddrinfo(name, None)
            return name
        except OSError:
            continue
    return None


def _scontrol(*arguments: str) -> str:
    """What `scontrol` prints, nothing where it cannot be asked."""
    try:
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _modified(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


if __name__ == "__main__":
    what, folder, *rest = sys.argv[1:]
    task = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    sys.exit(begin(Path(folder), task) if what == "begin" else end(Path(folder), task, int(rest[0])))
