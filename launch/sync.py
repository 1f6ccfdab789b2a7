"""W&B from the login node: uploads what a run on nodes that reach no network has written, also while it trains.

Not what `wandb sync` does: it uploads a segment once and whole (measured, 0.31). What a segment gains afterwards it
skips, it tells the server that the run has ended, and if it is made to do it again the rows stand there twice. Here the
server is asked how far it got, and what is missing comes from the run folder, as in trainer/report/wandb_session.py.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer import checkpoint, configfile
from trainer.config import ConfigError
from trainer.mistakes import warn
from trainer.report.folder import RunFolder
from trainer.report.wandb_session import Session, UnsentError, tear_down

DONE, LATER = 0, 1  # exit statuses


def sync(run: Path, every: float | None = None, pause: Callable[[float], None] = time.sleep) -> int:
    """Bring W&B up to date with `run`; 0, or 1 where the server has not taken all of it.

    Args:
        every: do it again and again, so many seconds apart, until the run is done and the server has all of it.
        pause: waits that many seconds.

    Raises:
        ConfigError: there is nothing to upload, or the run does it itself.
    """
    # Of the client's own files nothing is wanted: they would pass for what the run itself has logged.
    with tempfile.TemporaryDirectory(prefix="wandb-", ignore_cleanup_errors=True) as scratch:
        mirror, sent = _Mirror(RunFolder(run), Path(scratch)), False
        try:
            while True:
                sent = mirror.update()
                if every is None or mirror.over:
                    break
                pause(every)
        finally:
            sent = mirror.close() and sent
    return DONE if sent else LATER


class _Mirror:
    """The W&B run of one run folder, kept open between updates: on the dashboard it runs while the run does."""

    def __init__(self, folder: RunFolder, scratch: Path) -> None:
        self._folder, self._scratch = folder, scratch
        self._session: Session | None = None
        self._warned = False
        self.over = False  # the run is done, and the server has all of it

    def update(self) -> bool:
        """Upload what is missing; False where that cannot be done now."""
        origin = self._folder.read("run.json") or {}
        if "wandb_id" not in origin:
            raise ConfigError(f"{self._folder.path} holds no run that has begun (run.json): name a run folder")
        self._refuse_online()
        summary = self._folder.read("summary.json") or {}
        done = summary.get("status") == "done"

        def upload() -> None:
            if self._session is None:
                self._session = self._begin(origin)
            self._session.catch_up(summary["steps"] if done else self._saved())
            if done:
                session, self._session = self._session, None
                session.end(summary)
                self.over = True

        return self._try(upload)

    def close(self) -> bool:
        """Leave the W&B run, if it is still open; whether the server has all that it was given."""
        session, self._session = self._session, None
        return session is None or self._try(session.leave)

    def _try(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except UnsentError:
            problem = "W&B's server has not taken all of it"
        except Exception as error:
            problem = f"W&B's server cannot be had ({type(error).__name__}: {' '.join(str(error).split())})"
            self._session = None
            tear_down()
        else:
            return True
        if not self._warned:
            self._warned = True
            warn(f"{problem}; the next sync goes on from there")
        return False

    def _begin(self, origin: dict[str, Any]) -> Session:
        config = configfile.load(self._folder.path / "config.yaml")
        facts = configfile.to_dict(config) | {"run": origin}
        return Session(config.report, self._folder.path, origin["wandb_id"], facts, "online", self._scratch)

    def _saved(self) -> int:
        """The step of the newest save: what comes after it may be taken again."""
        return max((found.step for found in checkpoint.listing(self._folder.checkpoints)), default=0)

    def _refuse_online(self) -> None:
        """ConfigError if the run logs online by itself: two who do would log each row twice."""
        try:
            newest = os.readlink(self._folder.path / "wandb" / "latest-run")
        except OSError:
            return
        if Path(newest).name.startswith("run-") and self._folder.lease.beating():
            raise ConfigError(f"{self._folder.path} is being logged online by the run itself: there is nothing to sync")
