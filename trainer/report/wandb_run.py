"""The run on the W&B dashboard, as far as W&B can be had: no failure of it ever reaches training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer import environment
from trainer.config import Report

INIT_TIMEOUT, FINISH_TIMEOUT = 20, 60  # seconds; by default finish() waits for a dead server without limit
AXES = ("step", "epoch", "samples")
PERFORMANCE = ("images_per_second", "data_wait_fraction")


class WandbRun:
    """One W&B run for the whole life of a job; the main rank's alone."""

    def __init__(self, options: Report, folder: Path, identity: str, facts: dict[str, Any]) -> None:
        """Begin or go on with the W&B run `identity`; after a failure every method does nothing.

        Args:
            facts: the run's config on the dashboard.
        """
        self._run: Any = None
        mode = options.wandb
        if mode == "auto":
            mode = "online" if environment.has_wandb_key() else "offline"
        self._alive = mode != "disabled"
        self._try(lambda: self._begin(options, folder, identity, facts, mode))

    def log(self, record: dict[str, Any]) -> None:
        """Log a record of metrics.jsonl, its values by section (train/, eval/, perf/)."""
        values = {f"trainer/{axis}": record[axis] for axis in AXES}
        for key, value in record.items():
            if key not in ("kind", *AXES) and value is not None:
                values[f"{'perf' if key in PERFORMANCE else record['kind']}/{key}"] = value
        self._try(lambda: self._run.log(values))

    def finish(self, summary: dict[str, Any], status: int) -> None:
        """End the W&B run with the run's summary; waits for the server a minute at most."""
        self._try(lambda: self._run.summary.update({k: v for k, v in summary.items() if v is not None}))
        self._try(lambda: self._run.finish(exit_code=status))

    def _begin(self, options: Report, folder: Path, identity: str, facts: dict[str, Any], mode: str) -> None:
        import wandb

        settings = wandb.Settings(init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT, silent=True, console="off")
        self._run = wandb.init(
            project=options.project,
            name=options.name or folder.name,
            id=identity,
            resume="allow",
            dir=folder,
            config=facts,
            mode=mode,
            settings=settings,
        )
        # Not W&B's own step: it starts anew with each process.
        for axis in AXES:
            self._run.define_metric(f"trainer/{axis}")
        self._run.define_metric("*", step_metric="trainer/samples")

    def _try(self, call: Callable[[], Any]) -> None:
        """Do it, or warn once and never again."""
        if not self._alive:
            return
        try:
            call()
        except Exception as error:
            self._alive = False
            warnings.warn(f"no W&B from here on, metrics.jsonl has all: {type(error).__name__}: {error}", stacklevel=3)
