"""SLURM's commands, and what their refusals mean in one line."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from trainer.config import ConfigError

Ask = Callable[..., "str | None"]


def ask(*command: str, seconds: float = 30) -> str | None:
    """What a command prints; None where it fails, hangs or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def order(*command: str) -> None:
    """Run a command that must succeed; ConfigError with what it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise ConfigError(f"{command[0]} is not on this machine: use a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{' '.join(command)} did not answer within 60 s: is the cluster up? try sinfo") from None
    if done.returncode:
        raise ConfigError(f"{' '.join(command[:3])}: {_reason(done.stderr)}")


def demand_possible(script: str, asked: str) -> None:
    """Let SLURM judge a batch script without taking it; ConfigError with its reason.

    Args:
        asked: the resources in words, for the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test.sh"
        path.write_text(script)
        try:
            order("sbatch", "--test-only", str(path))
        except ConfigError as error:
            reason = str(error).removeprefix("sbatch --test-only ").removeprefix(f"{path}: ")
            partitions = " ".join((ask("sinfo", "-h", "-o", "%R") or "").split())
            hint = f"; partitions: {partitions}" if partitions else ""
            raise ConfigError(f"SLURM refuses {asked}: {reason}{hint}") from None


def _reason(stderr: str) -> str:
    """The line that says most: the last, without the command's name before it."""
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in stderr.strip().splitlines()]
    return lines[-1].strip() if lines else "no reason given"
