"""The run folder: what a run leaves on disk, and the lock that keeps a second process out of it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from trainer.config import ConfigError

PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "wandb", "numpy", "omegaconf")


class RunFolder:
    """`output_dir` of one run. Files are replaced whole, except metrics.jsonl, which grows by whole lines."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None
        self._metrics: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def acquire(self) -> None:
        """Make the folder and hold it until this process ends; ConfigError if another process does, or it cannot be."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a+")  # noqa: SIM115 (held open for as long as the lock is)
        except OSError as error:
            raise ConfigError(f"output_dir={self.path} cannot be written ({error.strerror}): choose another") from error
        try:
            # The kernel drops it with the process, however that ends: a dead run never blocks the next.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise ConfigError(f"output_dir={self.path} is in use by {holder}: wait for it or choose another") from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()

    def release(self) -> None:
        for file in (self._metrics, self._lock):
            if file is not None:
                file.close()

    def read(self, name: str) -> dict[str, Any] | None:
        """The JSON object in file `name`, None where there is none."""
        try:
            return json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ConfigError(
                f"{self.path / name} is not readable as JSON: {error}; restore it or remove it"
            ) from error

    def write(self, name: str, content: dict[str, Any] | str) -> None:
        """Replace file `name` as a whole: readers see the old one or the new one."""
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        aside = self.path / f".{name}.{os.getpid()}"
        aside.write_text(text)
        os.replace(aside, self.path / name)

    def add_metrics(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self._metrics is None:
            self._metrics = open(self.path / "metrics.jsonl", "a")  # noqa: SIM115 (kept open for the run)
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines of steps after `step`, which a resumed run takes again, and a line that a kill cut short."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["step"] <= step:
                kept.append(line + "\n")
        self.write("metrics.jsonl", "".join(kept))


def provenance(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """What a result must carry to be believed: code, versions, machine, command. A plain dictionary for run.json."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": command,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **_code(),
        "python": sys.version.split()[0],
        "versions": versions,
        "host": socket.gethostname(),
        "machine": platform.platform(),
        "environment": environment,
    }


def _code() -> dict[str, Any]:
    """The commit that runs, and whether it was changed; of frozen code what launch/snapshot.py wrote beside it."""
    frozen = Path(__file__).resolve().parents[2] / "SNAPSHOT.json"
    if frozen.exists():
        return json.loads(frozen.read_text())
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}


def _git(*arguments: str) -> str | None:
    """A fact about the code that runs, None where it is not in a git checkout."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
