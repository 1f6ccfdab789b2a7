"""W&B beside training, as far as it can be had: in a thread of its own, so nothing waits for it before the end.

Whatever fails is warned of once. A server that cannot be reached at the start turns the run into an offline one; one
that fails later W&B's client asks again and again. If that client's process is killed (SLURM's TERM goes to every
process of a step) it is started anew. In the end metrics.jsonl has all, and launch/sync.py brings it to the server.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer import environment
from trainer.config import Report
from trainer.mistakes import warn
from trainer.report.wandb_session import ARTIFACT_TIMEOUT, Session, UnsentError, kill_client, tear_down
from trainer.signals import held

PATIENCE = 75  # seconds that the end of a run waits for W&B at most; distributed.hang_after is longer
_STARTS = 3  # of W&B's process before it is given up

Order = Callable[[Session], object]


class WandbRun:
    """One W&B run for the whole life of a job; the main rank's alone. No method raises or takes time but `finish`."""

    def __init__(self, options: Report, folder: Path, identity: str, facts: dict[str, Any]) -> None:
        """Begin or go on with the W&B run `identity`.

        Args:
            folder: the run folder.
            facts: the run's config on the dashboard.
        """
        self._mode = environment.wandb_mode(options.wandb)
        self._begin = lambda mode: Session(options, folder, identity, facts, mode)
        self._later = f"metrics.jsonl has all, and `python -m launch sync {folder}` uploads it"
        self._artifact = options.artifact is not None
        self._warned = self._over = False
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if self._mode == "disabled":
            return
        if options.wandb == "online" and self._mode == "offline":
            self._warn("report.wandb=online, but there is no key: W&B is written offline (`wandb login` stores a key)")
        # A daemon: whatever W&B waits for, the process can end.
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        with held():
            self._thread.start()

    def saved(self, step: int) -> None:
        """The save of `step` is on disk: the rows up to there are never taken again, and can be logged."""
        self._orders.put(lambda session: session.catch_up(step))

    def finish(self, summary: dict[str, Any]) -> None:
        """End the W&B run with the run's summary (of summary.json), and wait for it, `PATIENCE` seconds at most.

        `report.artifact` takes longer.
        """
        if self._thread is None:
            return
        if summary["status"] != "failed":  # then all of it is saved
            self.saved(summary["steps"])
        self._orders.put(lambda session: session.end(summary))
        self._orders.put(None)
        patience = PATIENCE + (ARTIFACT_TIMEOUT if self._artifact else 0)
        self._thread.join(patience)
        if self._thread.is_alive():
            self._over = True
            kill_client()
            self._warn(f"W&B was not done within {patience} s; {self._later}")

    def _work(self) -> None:
        """Do what is ordered until the end is, or W&B is given up."""
        session, starts = None, 0
        while order := self._orders.get():
            while True:
                try:
                    if session is None:
                        starts += 1
                        session = self._open()
                    order(session)
                    break
                except UnsentError:
                    self._warn(f"W&B's server has not taken all of it yet; {self._later}")
                    kill_client()  # it would go on asking, and hold up the end of this process
                    return
                except Exception as error:
                    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
                    if self._over:
                        return
                    session = None
                    tear_down()
                    if starts == _STARTS:
                        self._warn(f"no W&B from here on ({what}); {self._later}")
                        return
                    self._warn(f"W&B's process is started anew ({what})")

    def _open(self) -> Session:
        """A session, offline where the server cannot be had."""
        if self._mode == "online":
            try:
                return self._begin("online")
            except Exception as error:
                what = f"{type(error).__name__}: {' '.join(str(error).split())}"
                self._warn(f"W&B is written offline, its server cannot be had ({what}); {self._later}")
                self._mode = "offline"
                tear_down()
        return self._begin("offline")

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            warn(problem)
