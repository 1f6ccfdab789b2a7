"""A W&B run under way in this process, fed from the run folder. Anything here may raise, and may take its time.

**Each step once.** W&B's history only grows: what a killed attempt has logged stays, and the resumed run takes the
steps since its last save again. W&B's own rewind (`resume_from`) is a private preview of its cloud, wants W&B's step
and does nothing offline. So rows are held back until the save that covers them is on disk: what is logged is never
taken again, and nothing ever needs a rewind, online or offline. The price: the dashboard lags by up to one save.

**Nothing lost.** W&B's process buffers, and a kill takes the buffer along. But metrics.jsonl has all, so whoever begins
to log first asks how far the history goes, the server's where it is online and the segments' on disk where it is not,
and logs what is missing: after a kill, after an outage, after attempts that logged elsewhere or not at all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from trainer.config import Report
from trainer.report import media, rows
from trainer.report.rows import AXES, Position
from trainer.report.segments import written

INIT_TIMEOUT, FINISH_TIMEOUT = 20, 30  # seconds; by default finish() waits for a dead server without limit
ARTIFACT_TIMEOUT, PROBE_TIMEOUT = 180, 5
PREEMPTING = ("SIGTERM", "SIGUSR2")


class UnsentError(Exception):
    """The server has not taken everything in time; what is missing is on disk."""


class Session:
    """The W&B run `identity`, begun or gone on with."""

    def __init__(
        self,
        options: Report,
        folder: Path,
        identity: str,
        facts: dict[str, Any],
        mode: str,
        home: Path | None = None,
    ) -> None:
        """
        Args:
            folder: the run folder.
            facts: the run's config on the dashboard.
            mode: online | offline.
            home: for the client's own files (default: the run folder).
        """
        import wandb

        self._wandb, self._options, self._folder, self._online = wandb, options, folder, mode == "online"
        wandb.setup(wandb.Settings(silent=True))  # it logs in aloud otherwise
        before = Position() if self._online else written(folder, identity)
        settings = wandb.Settings(
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
            silent=True,
            console="off",
        )
        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            name=options.name or folder.name,
            group=options.group,
            job_type=options.job_type,
            tags=options.tags,
            notes=options.notes,
            id=identity,
            resume="allow",
            dir=home or folder,
            config=facts,
            mode=mode,
            settings=settings,
        )
        self.position = Position.of(dict(self._run.summary)) if self._online else before
        # Not W&B's own step: it starts anew with each process.
        for axis in (*AXES, "eval/step"):
            self._run.define_metric(axis if "/" in axis else f"trainer/{axis}", hidden=True)
        self._run.define_metric("*", step_metric="trainer/samples")

    def catch_up(self, until: float) -> None:
        """Log the rows of metrics.jsonl up to step `until` that the history lacks."""
        for row in rows.missing(self._folder / "metrics.jsonl", self.position, until):
            pictures = media.examples(self._folder) if self.position == Position() else {}
            if "eval/step" in row:
                pictures |= media.tables(self._folder, row["eval/step"])
            self._run.log(row | pictures)
            self.position = self.position.after(Position.of(row))

    def end(self, summary: dict[str, Any]) -> None:
        """Say how the run has ended, and leave; UnsentError where the server has not taken all of it in time.

        Args:
            summary: of summary.json.
        """
        status = summary["status"]
        known = {key: value for key, value in summary.items() if value is not None}
        self._run.summary.update(known | best(self._folder / "metrics.jsonl"))
        sent = status != "done" or self._options.artifact != "best" or self._add_best_checkpoint()
        preempted = status == "stopped" and summary.get("signal") in PREEMPTING
        if preempted:
            self._run.mark_preempting()
        # The client sends an alert before all that follows, and asks a server that fails again without limit: measured
        # (0.31), finish() then never returns, whatever its timeout.
        if not self._online or answers(self._run.settings.base_url):
            self._run.alert(*_alert(self._folder.name, summary))
        self.leave(1 if status == "failed" or preempted else 0)
        if not sent:
            raise UnsentError

    def leave(self, status: int = 0) -> None:
        """End what this process logs; UnsentError as `end`."""
        try:
            self._run.finish(exit_code=status)
        except TimeoutError as error:
            raise UnsentError from error

    def _add_best_checkpoint(self) -> bool:
        """Log it as an artifact; whether the server has it, in so far as there is one."""
        path = media.best_checkpoint(self._folder)
        if path is None:
            return True
        artifact = self._wandb.Artifact(f"{self._run.id}-best", type="model", metadata={"step": int(path.name)})
        artifact.add_dir(str(path), policy="immutable")  # without a copy of it in the user's home
        logged = self._run.log_artifact(artifact, aliases=["best"])
        try:
            if self._online:
                logged.wait(timeout=ARTIFACT_TIMEOUT)
        except Exception:
            return False
        return True


def tear_down() -> None:
    """End W&B's process, if it has not ended: beside it, another start after a failure would fail too."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):  # it exits with the status of a process that was killed
        wandb.teardown()


def kill_client() -> None:
    """End W&B's process at once, which may keep this one from ending; what it has not sent is on disk."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = status.read_text().partition("(")[2].rpartition(")")  # PID (NAME) STATE PARENT ...
            if name == "wandb-core" and int(rest.split()[1]) == os.getpid():
                os.kill(int(status.parent.name), signal.SIGKILL)
    tear_down()  # or its handler at exit speaks of the lost connection


def answers(url: str) -> bool:
    """Whether a server is there that does not fail."""
    try:
        with urllib.request.urlopen(url, timeout=PROBE_TIMEOUT):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, ValueError):
        return False


def best(metrics: Path) -> dict[str, Any]:
    """The best evaluation so far: top-1 in percent and its epoch."""
    evaluations = [record for record in rows.read(metrics) if record["kind"] == "eval"]
    if not evaluations:
        return {}
    found = max(evaluations, key=lambda record: record["top1"])
    return {"best_top1": found["top1"], "best_epoch": found["epoch"]}


def _alert(name: str, summary: dict[str, Any]) -> tuple[str, str, str]:
    """Title, text and level of the message that W&B sends when a run has ended."""
    status, step = summary["status"], summary.get("steps")
    if status == "done":
        top1 = summary.get("best_top1")
        found = f"top-1 {top1:.2f}% at best, " if top1 is not None else ""
        return f"{name} is done", f"{found}{step} steps", "INFO"
    if status == "stopped":
        return f"{name} was stopped", f"by {summary.get('signal')} at step {step}; the same command goes on", "WARN"
    error = str(summary.get("error"))
    what = "has a loss that is not finite" if error.startswith("NonFiniteError") else "has failed"
    return f"{name} {what}", f"at step {step}: {error}", "ERROR"
