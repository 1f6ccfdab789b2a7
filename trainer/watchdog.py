"""What each rank is doing, told to the others, so that a rank that dies or hangs is named and nobody waits for ever.

A thread of each rank writes a beat into the ranks' common store about once a second. Where nothing moves any more, the
beats say who is silent (stopped, or its machine gone) and who came least far (stuck in its loader, in a save): those
are named, every rank writes down its stacks, and the processes end. Time is counted in beats of the thread's own, so a
job that is suspended as a whole and continued, or a clock that is set, is no hang.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from trainer.config import RunError
from trainer.distributed import World
from trainer.signals import Stopped, held

FAILED = 1  # exit status of a process that ends itself
# Where one rank works alone or a compiler runs, it may take so many times longer: all of the first step, these phases.
PATIENCE = 10
LONG = ("start", "save", "finish")
_LEAVING = 5  # seconds for a process to end after an error
_SILENT = 3  # beats that a living process does not miss in a row


class PeerLostError(RunError):
    """Another rank has ended or hangs."""

    everywhere = False


@dataclass(frozen=True)
class Place:
    """How far a rank has come."""

    phases: int = 0  # entered so far: all ranks enter the same ones, so the one with the fewest holds up the others
    moves: int = 0  # within the phase: files read, batches evaluated
    phase: str = "start"
    step: int = 0

    @property
    def patience(self) -> int:
        return PATIENCE if self.phase in LONG or self.phase.startswith("first ") else 1


@dataclass(frozen=True)
class Beat:
    """A rank as the others see it."""

    host: str
    pid: int
    number: int = 0  # of the beat
    still: float = 0.0  # seconds since it got any further
    ended: str = ""  # why it ended, where it could say
    place: Place = field(default_factory=Place)

    @classmethod
    def parse(cls, text: bytes) -> Beat:
        facts = json.loads(text)
        return cls(**facts | {"place": Place(**facts["place"])})

    @property
    def far(self) -> tuple[int, int]:
        return self.place.phases, self.place.moves

    def __str__(self) -> str:
        why = f"; {self.ended}" if self.ended else ""
        place = f"last heard of in step {self.place.step}, phase {self.place.phase}"
        return f"process {self.pid} on {self.host}, {place}{why}"


class Watch:
    """This rank's beat, and its eye on the others'. A context around a run.

    Args:
        folder: where the stacks are written, beside standard error.
        hang_after: seconds without progress after which the run ends; `PATIENCE` times that at first and while saving.
    """

    def __init__(self, here: World, folder: str | Path, hang_after: float) -> None:
        self._here, self._folder, self._hang_after = here, Path(folder), hang_after
        self._place = Place()  # replaced by the main thread alone, as everything below is by the other one
        self._seconds = min(1.0, hang_after / 10)  # of a beat
        self._number, self._still = 0, 0.0
        self._over = threading.Event()
        # A connection of its own: a main thread that waits for a key must not hold up the beats.
        self._store = here.store.clone() if here.store is not None else None
        self._seen: dict[int, Beat] = {}
        self._changed: dict[int, int] = {}  # by rank, the number of my beat at which its own was last seen to change

    def enter(self, phase: str, step: int | None = None) -> None:
        """This rank begins something else. Every rank calls it equally often; it costs about a microsecond."""
        place = self._place
        self._place = Place(place.phases + 1, 0, phase, place.step if step is None else step)

    def moved(self, *_: object) -> None:
        """There is progress within a phase."""
        place = self._place
        self._place = Place(place.phases, place.moves + 1, place.phase, place.step)

    def __enter__(self) -> Watch:
        self._tell()  # so that everybody knows everybody's host and process
        with held():
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        with suppress(RuntimeError):
            self._tell(f"{kind.__name__}: {error}" if kind else "done")
        if self._store is not None and error is not None and self._alone(error):
            # Seen here: after an exception that one rank alone met, its process hung on its way out with its
            # connections open, and the others waited for it. The alarm needs neither Python nor a living thread.
            faulthandler.dump_traceback_later(_LEAVING, exit=True, file=sys.__stderr__)
            signal.alarm(2 * _LEAVING)

    @staticmethod
    def _alone(error: BaseException) -> bool:
        """Whether this rank leaves without the others."""
        return not isinstance(error, Stopped) and not getattr(error, "everywhere", False)

    @contextmanager
    def naming_a_lost_peer(self) -> Iterator[None]:
        """Turn the traceback of a broken connection into one line that says which rank is gone, and where it stood."""
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or "gloo" in str(error)
            if self._store is None or isinstance(error, RunError) or not lost:
                raise
            reason = str(error).strip().splitlines()[0].split(". ")[0]
            here, place = self._here, self._place
            raise PeerLostError(
                f"rank {here.rank} of {here.size}, in step {place.step}, phase {place.phase}, "
                f"lost {self._who_is_gone() or 'another rank'}: {reason}; the same command goes on from the last save"
            ) from error

    # The thread.

    def _run(self) -> None:
        place = self._place
        while not self._over.wait(self._seconds):
            self._number += 1
            self._still = self._still + self._seconds if self._place == place else 0.0
            place = self._place
            try:
                self._tell()
                # Only in the second half of the time: each look asks for every rank's beat.
                if 2 * self._still >= self._hang_after:
                    self._look(self._changed, self._number)
            except RuntimeError:
                # The store is gone, with the process that kept it; the main thread's next collective fails as well.
                self._changed.setdefault(0, self._number)
            if self._still >= self._hang_after and (why := self._verdict()):
                self._end(why)
            if self._still == 0:
                self._changed.clear()

    def _tell(self, ended: str = "") -> None:
        mine = Beat(socket.gethostname(), os.getpid(), self._number, self._still, ended, self._place)
        self._seen[self._here.rank] = mine
        if self._store is not None:
            self._store.set(f"beat/{self._here.rank}", json.dumps(asdict(mine)))

    def _look(self, changed: dict[int, int], number: int) -> None:
        """Read every rank's beat; note in `changed` whose has changed by look `number`."""
        if self._store is None:
            return
        for rank in range(self._here.size):
            key = f"beat/{rank}"
            if rank == self._here.rank:
                continue
            if not self._store.check([key]):
                changed.setdefault(rank, number)
                continue
            beat = Beat.parse(self._store.get(key))
            if rank not in changed or rank not in self._seen or beat.number != self._seen[rank].number:
                changed[rank] = number
            self._seen[rank] = beat

    def _verdict(self) -> str:
        """Who holds up the run, in words; empty where it may yet go on."""
        silent = [rank for rank, changed in self._changed.items() if self._number - changed >= _SILENT]
        if silent:
            return "; ".join(
                f"rank {rank} no longer answers ({self._seen.get(rank, 'no beat yet')})" for rank in silent
            )
        least = min(beat.far for beat in self._seen.values())
        last = {rank: beat for rank, beat in sorted(self._seen.items()) if beat.far == least}
        if any(beat.still < self._hang_after * beat.place.patience for beat in last.values()):
            return ""
        return "; ".join(f"rank {rank} holds up the run ({beat})" for rank, beat in last.items())

    def _end(self, why: str) -> None:
        """Write down why and where every thread of this process is, and end it."""
        why = f"no progress for {self._hang_after:g} s (distributed.hang_after): {why}"
        with suppress(RuntimeError):
            self._tell(why)
        lines = f"error: rank {self._here.rank} ends: {why}; its stacks follow\n"
        sys.stderr.write(lines)
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.__stderr__)
        with suppress(OSError), open(self._folder / f"stacks-rank{self._here.rank}.txt", "w") as file:
            file.write(lines)
            file.flush()
            faulthandler.dump_traceback(file)
        os._exit(FAILED)

    # Blame.

    def _who_is_gone(self) -> str:
        """The ranks that ended, and where they stood, in words; empty if it cannot be found out. Takes some beats."""
        changed: dict[int, int] = {}
        guilty: dict[int, Beat] = {}
        try:
            for number in range(_SILENT + 2):
                self._look(changed, number)
                # Those who themselves only lost somebody are not to blame.
                known = changed.keys() & self._seen.keys()
                gone = {rank: self._seen[rank] for rank in known if self._gone(rank, number - changed[rank])}
                guilty = {rank: beat for rank, beat in gone.items() if PeerLostError.__name__ not in beat.ended}
                if guilty:
                    break
                time.sleep(self._seconds)
        except RuntimeError:
            return f"rank 0, which keeps the common store ({self._seen.get(0, 'no beat yet')})"
        return "; ".join(f"rank {rank} ({beat})" for rank, beat in sorted(guilty.items()))

    def _gone(self, rank: int, unchanged: int) -> bool:
        beat = self._seen[rank]
        if beat.ended or (beat.host == socket.gethostname() and not _alive(beat.pid)):
            return True
        return unchanged >= _SILENT


def _alive(pid: int) -> bool:
    """Whether the process runs: one that has ended stays as a zombie until its parent asks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
