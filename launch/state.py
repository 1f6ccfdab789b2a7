"""The state of a job: from squeue, then sacct, then the run folder.

Not from submitit: without accounting it never learns that a job was killed, and it believes a node failure to be the
end of a job that SLURM has put back into the queue. A job that comes back keeps its number, and only squeue knows.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch import queue
from launch.attempt import DONE, STOP, Record
from launch.record import Submitted
from trainer.report.folder import RunFolder

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "GONE")


@dataclass(frozen=True)
class State:
    """What a job is doing."""

    name: str  # SLURM's word, or GONE where neither SLURM nor the run folder knows
    nodes: str = ""
    reason: str = ""  # why it waits
    source: str = "squeue"

    @property
    def live(self) -> bool:
        """Whether it runs, waits, or will come back."""
        return self.name not in ENDED


def of(submitted: Submitted, ask: queue.Ask = queue.ask) -> State:
    """The state of a run's newest job."""
    # squeue knows live jobs, and ended ones for MinJobAge (300 s by default).
    for line in _lines(ask("squeue", "-h", "-j", submitted.job, "-t", "all", "-o", "%T|%N|%r")):
        name, nodes, reason = [*line.split("|"), "", ""][:3]
        return State(name, nodes, "" if reason == "None" else reason)
    rows = _lines(ask("sacct", "-X", "-n", "-P", "-D", "-j", submitted.job, "-o", "State,NodeList"))
    if rows:
        name, _, nodes = rows[-1].partition("|")  # -D: one row a restart, the newest last
        return State(name.split()[0], nodes, source="sacct")
    return _from_folder(submitted)


def _from_folder(submitted: Submitted) -> State:
    """What the run folder says of a job that the queue has forgotten."""
    record = Record(submitted.run, submitted.job)
    ends = [line for line in record.lines() if line["event"] == "end"]
    begun = record.begun()
    status = (RunFolder(submitted.run).read("summary.json") or {}).get("status")
    complete = bool(ends and begun) and ends[-1]["attempt"] >= begun[-1]["attempt"]
    if (record.folder / "cancel").exists():
        name = "CANCELLED"
    elif complete and ends[-1]["verdict"] == DONE and status == "done":
        name = "COMPLETED"
    elif complete and ends[-1]["verdict"] == STOP:
        name = "FAILED"
    else:
        name = "GONE"
    return State(name, begun[-1]["nodes"] if begun else "", ends[-1]["reason"] if ends else "", "run folder")


def _lines(text: str | None) -> list[str]:
    return [line.strip() for line in (text or "").splitlines() if line.strip()]
