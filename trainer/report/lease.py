"""Whose run folder it is, for hosts that share nothing but the folder: a file naming the holder, and its heartbeat.

`lease.json` says who holds the folder. The holder's heartbeat is a counter in a file of its own, named by the holder's
nonce, so that a holder taken for dead can never overwrite the lease of the next. Whoever finds a lease compares the
counter with itself over a wait: no clock is read, so none can be wrong.

A lease cannot keep a process that slept through its end from writing. So it is fenced: before each write that matters
the holder reads it again, and stops when it names somebody else.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from trainer import environment
from trainer.config import ConfigError, RunError
from trainer.mistakes import warn

INTERVAL = 10.0  # seconds between heartbeats
PATIENCE = 2  # heartbeats without which a holder is dead


class FolderLostError(RunError):
    """Another process has taken the run folder over."""

    everywhere = False


@dataclass(frozen=True)
class Holder:
    """A process that holds a run folder."""

    host: str
    pid: int
    boot: str  # of the kernel: two containers of one machine share it
    nonce: str
    job: str | None  # SLURM's
    restarts: int  # SLURM's, of that job
    released: bool = False  # it has left; still named, so that whoever it succeeded knows

    @classmethod
    def this(cls) -> Holder:
        """This process, with a nonce of its own."""
        job, restarts = environment.slurm_attempt() or (None, 0)
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            boot = ""
        return cls(socket.gethostname(), os.getpid(), boot, secrets.token_hex(8), job, restarts)

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"

    def succeeds(self, other: Holder) -> bool:
        """Whether SLURM has started this process in the place of `other`: it would not while `other` were wanted."""
        return self.job is not None and self.job == other.job and self.restarts > other.restarts

    def shares_kernel(self, other: Holder) -> bool:
        return bool(self.boot) and self.boot == other.boot


class Lease:
    """The lease of one run folder. `take` before anything else, `release` at the end."""

    def __init__(self, folder: Path, interval: float = INTERVAL, pause: Callable[[float], None] = time.sleep) -> None:
        """
        Args:
            interval: seconds between heartbeats; the same for all who share a folder.
            pause: waits that many seconds.
        """
        self._folder, self._interval, self._pause = folder, interval, pause
        self.me: Holder | None = None
        self._over = threading.Event()

    def read(self) -> Holder | None:
        """Who holds the folder, None for nobody; OSError if that cannot be read."""
        try:
            return Holder(**json.loads((self._folder / "lease.json").read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            warn(f"{self._folder / 'lease.json'} is not a lease ({error}): it counts for nothing")
            return None

    def take(self, *, locked: bool) -> None:
        """Become the holder; ConfigError if another process lives that is, OSError if the folder cannot be written.

        Args:
            locked: this process has the kernel's lock on the folder: nobody else on this kernel does.
        """
        me, before = Holder.this(), self.read()
        free = before is None or before.released or me.succeeds(before) or (locked and me.shares_kernel(before))
        if not free:
            self._demand_dead(before, me)
        self._beat(me, 0, os.O_CREAT)
        self._write(me)
        self.me = me
        if before is not None:
            self._heartbeat(before).unlink(missing_ok=True)
        threading.Thread(target=self._keep_beating, args=(me,), name="heartbeat", daemon=True).start()

    def demand(self) -> None:
        """FolderLostError if the folder was taken over; OSError if that cannot be known; nothing without a lease."""
        if self.me is None:
            return
        holder = self.read()
        if holder is None:
            raise FileNotFoundError(2, "the lease is gone", str(self._folder / "lease.json"))
        if holder.nonce != self.me.nonce:
            raise FolderLostError(
                f"output_dir={self._folder} was taken over by {holder}, for which this process was dead: "
                "it stops here and writes nothing more"
            )

    def beating(self) -> bool:
        """Whether whoever holds the folder is alive; watches the heartbeat where that is the only way to tell."""
        holder, me = self.read(), Holder.this()
        if holder is None or holder.released:
            return False
        if holder.host == me.host and holder.shares_kernel(me):
            return _runs(holder.pid)
        seen = self._pulse(holder)
        self._pause(PATIENCE * self._interval)
        return self._pulse(holder) != seen

    def release(self) -> None:
        """Leave the folder to whoever comes next, at once."""
        self._over.set()
        me, self.me = self.me, None
        if me is None:
            return
        with contextlib.suppress(OSError):  # a folder that has vanished holds nobody up
            holder = self.read()
            if holder is not None and holder.nonce == me.nonce:
                self._write(replace(me, released=True))
            self._heartbeat(me).unlink(missing_ok=True)

    def _demand_dead(self, before: Holder, me: Holder) -> None:
        """Return when `before` is known to be dead; ConfigError as soon as it shows a sign of life."""
        if before.host == me.host and before.shares_kernel(me) and not _runs(before.pid):
            return
        patience = PATIENCE * self._interval
        warn(f"output_dir={self._folder} was left by {before}: watching its heartbeat for {patience:.0f} s")
        seen = self._pulse(before)
        waited = 0.0
        while waited < patience:
            self._pause(self._interval / 4)
            waited += self._interval / 4
            now = self.read()
            if now is None or (now.released and now.nonce == before.nonce):
                return
            if now.nonce != before.nonce or self._pulse(before) != seen:
                raise ConfigError(f"output_dir={self._folder} is in use by {now}: wait for it or choose another")

    def _heartbeat(self, holder: Holder) -> Path:
        return self._folder / f".heartbeat.{holder.nonce}"

    def _pulse(self, holder: Holder) -> str:
        try:
            return self._heartbeat(holder).read_text()  # opened anew each time, which makes NFS ask the server
        except OSError:
            return ""

    def _write(self, me: Holder) -> None:
        aside = self._folder / f".lease.{me.nonce}"
        aside.write_text(json.dumps(asdict(me)))
        os.replace(aside, self._folder / "lease.json")

    def _beat(self, me: Holder, count: int, flags: int = 0) -> None:
        # Always as long as before and in place, so that a disk without room takes it too.
        descriptor = os.open(self._heartbeat(me), os.O_WRONLY | flags, 0o644)
        try:
            os.pwrite(descriptor, b"%020d\n" % count, 0)
        finally:
            os.close(descriptor)

    def _keep_beating(self, me: Holder) -> None:
        count = 0
        while not self._over.wait(self._interval):
            count += 1
            with contextlib.suppress(OSError):  # released, taken over or gone: the next save tells which
                self._beat(me, count)


def _runs(pid: int) -> bool:
    """Whether a process of this number runs on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
