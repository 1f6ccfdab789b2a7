"""TensorBoard, for who asks for it (`report.tensorboard=true`): the scalars of metrics.jsonl in RUN/tensorboard."""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import Any

from trainer.config import ConfigError, Report
from trainer.mistakes import warn

AXES = ("kind", "step", "epoch", "samples", "wall_seconds")


def demand(options: Report) -> None:
    """ConfigError if TensorBoard is asked for and cannot be had."""
    if options.tensorboard and util.find_spec("tensorboard") is None:
        raise ConfigError(
            "report.tensorboard=true needs the package tensorboard: pip install 'imagenet-trainer[tensorboard]', or "
            "leave it out"
        )


class Board:
    """Writes the run's scalars; a failure is warned of once and ends the writing, not the run."""

    def __init__(self, options: Report, folder: Path, step: int) -> None:
        """`step`: what was written of later steps, by a run that was cut short, is not to be shown."""
        self._writer: Any = None
        self._folder = folder / "tensorboard"
        if options.tensorboard:
            self._try(lambda: self._open(step))

    def rewind(self, step: int) -> None:
        """Show nothing of what was written of steps after `step`."""
        if self._writer is not None:
            self.close()
            self._try(lambda: self._open(step))

    def log(self, record: dict[str, Any]) -> None:
        """Write a record of metrics.jsonl as KIND/NAME at its step."""
        if self._writer is None:
            return
        scalars = {k: v for k, v in record.items() if k not in AXES and isinstance(v, (int, float))}

        def write() -> None:
            for name, value in scalars.items():
                self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

        self._try(write)

    def close(self) -> None:
        if self._writer is not None:
            self._try(self._writer.close)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Also after a rewind to the start, for which there is something to purge where there is a file already.
        purge = step + 1 if step or self._folder.exists() else None
        self._writer = SummaryWriter(str(self._folder), purge_step=purge)

    def _try(self, call: Any) -> None:
        try:
            call()
        except Exception as error:
            self._writer = None
            warn(f"no TensorBoard from here on, metrics.jsonl has all: {type(error).__name__}: {error}")
