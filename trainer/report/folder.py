"""The run folder: what a run leaves on disk, and the lock and the lease that keep a second process out of it."""

from __future__ import annotations

import contextlib
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
from trainer.mistakes import warn
from trainer.report.lease import FolderLostError, Holder, Lease

METRICS = "metrics.jsonl"
PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "wandb", "numpy", "omegaconf")
LINES = (METRICS, "gradients.jsonl")  # one object a line, of a step that a resumed run may take again


class RunFolder:
    """`output_dir` of one run. Files are replaced whole, except those of JSON lines, which grow by whole lines.

    Two processes of one kernel are kept apart by its lock, which ends with its holder, however that ends. Not every
    network file system passes locks on to other hosts, so there is a lease as well.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lease = Lease(self.path)
        self._lock: IO[str] | None = None
        self._lines: dict[str, IO[bytes]] = {}  # by file name
        self._complained = False

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def acquire(self) -> None:
        """Make the folder and hold it until this process ends; ConfigError if another process does, or it cannot be."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a+")  # noqa: SIM115 (held open for as long as the lock is)
            self.lease.take(locked=self._locked())
        except OSError as error:
            raise _unwritable(f"output_dir={self.path}", error) from error

    def _locked(self) -> bool:
        """Whether the kernel's lock is ours; False where this file system has none. ConfigError if it is another's."""
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        except OSError:
            return False
        holder = self.lease.read()
        if holder is not None and Holder.this().succeeds(holder):
            # Ranks of the attempt before that are dying and not yet dead keep the old file's lock for themselves.
            os.unlink(self.path / ".lock")
            self._lock.close()
            self._lock = open(self.path / ".lock", "a+")  # noqa: SIM115
            return self._locked()
        self._lock.close()
        raise ConfigError(
            f"output_dir={self.path} is in use by {holder or 'another process'}: wait for it or choose another"
        )

    def demand_held(self) -> None:
        """FolderLostError if another process has taken this folder over, OSError if that cannot be known."""
        self.lease.demand()

    def release(self) -> None:
        for file in (*self._lines.values(), self._lock):
            if file is not None:
                file.close()
        self._lines.clear()
        self.lease.release()

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
        """Replace file `name` as a whole: readers see the old one or the new one. ConfigError if it cannot be."""
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        aside = self.path / f".{name}.{os.getpid()}"
        try:
            self.demand_held()
            with open(aside, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.path / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise _unwritable(self.path / name, error) from error

    def try_to_write(self, name: str, content: dict[str, Any] | str) -> None:
        """As `write`, for what a run can do without: what cannot be written is warned of, once a run."""
        try:
            self.write(name, content)
        except ConfigError as error:
            self._complain(str(error))
        except FolderLostError:
            pass  # the saver has said so, and the run has ended for it

    def add_metrics(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        self.add_line(METRICS, record)

    def add_line(self, name: str, record: dict[str, Any]) -> None:
        """Append one line to file `name`, or none of it; what cannot be written is warned of, once a run."""
        line = json.dumps(record).encode() + b"\n"
        try:
            if name not in self._lines:
                # Unbuffered: a line that a full disk refused must not come back with the next one.
                file = open(self.path / name, "a+b", buffering=0)  # noqa: SIM115 (kept open)
                self._lines[name] = file
                end = file.seek(0, os.SEEK_END)
                if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                    line = b"\n" + line  # a kill cut the last one short: it must not take this one along
            file = self._lines[name]
            end = os.fstat(file.fileno()).st_size
            try:
                while line:  # a disk that is nearly full takes a part, and refuses the rest
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(end)
                raise
        except OSError as error:
            self._complain(str(_unwritable(self.path / name, error)))

    def _complain(self, problem: str) -> None:
        if not self._complained:
            self._complained = True
            warn(f"{problem}; training goes on without")

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines of steps after `step`, which a resumed run takes again, and a line that a kill cut short."""
        for name in LINES:
            if name in self._lines:
                self._lines.pop(name).close()
            if (self.path / name).exists():
                self._rewind(name, step)

    def _rewind(self, name: str, step: int) -> None:
        kept = []
        for line in (self.path / name).read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["step"] <= step:
                kept.append(line + "\n")
        self.write(name, "".join(kept))


def _unwritable(what: str | Path, error: OSError) -> ConfigError:
    return ConfigError(f"{what} cannot be written ({error.strerror}): make room or choose another output_dir")


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
