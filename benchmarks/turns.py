"""Candidates in processes of their own, started once and measured in turn: A-B-A-B.

What one candidate does to its process (malloc options, a compiler's caches, a GPU's allocator) is nothing to the
others, and each has the same machine, minutes apart at most. Who waits is blocked in a read of a pipe, without memory
that it could give back; where it has workers that would go on, it is stopped with them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

Step = Callable[[], object]
PATIENCE = 20  # seconds in which a process that is told to end does


class Lost(Exception):
    """A candidate's process has failed; says why in a line."""


class Candidate:
    """A process under way, which takes a block of steps when asked to."""

    def __init__(self, name: str, command: Sequence[str], started_within: float, *, stops: bool = False) -> None:
        """Starts `command`, whose process calls `serve`, and waits until it has built and warmed up; Lost if not.

        `stops`: its whole process group stands still between blocks.
        """
        self.name = name
        self._stops = stops
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by end()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen(command, text=True, start_new_session=stops, **pipes)
        try:
            self.ready = self._answer(started_within)
        except Lost:
            self.end()
            raise
        self._signal(signal.SIGSTOP)

    def block(self, count: int, within: float = 1200.0, meanwhile: Callable[[], object] = lambda: None) -> dict:
        """What `count` steps cost, as `serve` says; `meanwhile` is called once, about the middle. Lost on failure."""
        self._signal(signal.SIGCONT)
        try:
            print(count, file=self._process.stdin, flush=True)
        except OSError as error:
            raise self._lost(f"{error}") from error
        answer = self._answer(within, meanwhile)
        self._signal(signal.SIGSTOP)
        return answer

    def dismiss(self) -> None:
        """Tell the process to end."""
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # it reads the end of its commands

    def end(self) -> None:
        """End the process, and wait for it."""
        self.dismiss()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._signal(signal.SIGKILL)  # workers that it has left behind
        self._process.stdout.close()
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._stops:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _answer(self, within: float, meanwhile: Callable[[], object] = lambda: None) -> dict:
        began, called = time.monotonic(), False
        while not select.select([self._process.stdout], [], [], 0.5)[0]:
            if not called:
                meanwhile()
                called = True
            if time.monotonic() - began > within:
                self._process.kill()  # it may not be there to read the end of its commands
                raise self._lost(f"no answer within {within:.0f} s")
        line = self._process.stdout.readline()
        if not called:
            meanwhile()
        if not line:
            self._process.wait(PATIENCE)
            raise self._lost(f"exit status {self._process.returncode}")
        return json.loads(line)

    def _lost(self, why: str) -> Lost:
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        return Lost(f"{why}: {lines[-1].strip()[:300]}" if lines else why)


@contextlib.contextmanager
def answers() -> Callable[[dict], None]:
    """Gives what answers the one who started this process; whatever else is printed goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with out:
        yield lambda answer: print(json.dumps(answer), file=out, flush=True)


def serve(make: Callable[[], Step], device: torch.device, warmup: int = 3) -> None:
    """Build a step, warm it up, say so, and take blocks as the lines of standard input say, until it ends."""
    with answers() as answer:
        began = time.perf_counter()
        step = make()
        for _ in range(warmup):
            step()
        wait(device)
        answer({"seconds_to_warm": time.perf_counter() - began})
        rested = time.process_time()
        for line in sys.stdin:
            idle = time.process_time() - rested
            cost = block(step, int(line), device)
            give_back(device)
            answer(cost | {"idle_cpu": idle, "peak": peak_memory(device)})
            rested = time.process_time()


def block(step: Step, count: int, device: torch.device) -> dict[str, float]:
    """Seconds on the clock and of all cores, and page faults, of a step: the mean of `count`."""
    step()  # what it has given back comes back, and its tensors into the caches
    wait(device)
    began, cpu, faults = time.perf_counter(), time.process_time(), _faults()
    for _ in range(count):
        step()
    wait(device)
    ended = time.perf_counter(), time.process_time(), _faults()
    names = ("wall", "cpu", "faults")
    return {name: (b - a) / count for name, a, b in zip(names, (began, cpu, faults), ended)}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def give_back(device: torch.device) -> None:
    """Free memory, to the others; the first step of a block, which is not counted, takes it again."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine_now() -> dict:
    """Load, and clocks in MHz: of each core, and of a GPU with its power and temperature where nvidia-smi says so."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = {
        "load": round(os.getloadavg()[0], 2),
        "mhz": [round(float(line.partition(":")[2])) for line in lines if line.startswith("cpu MHz")],
    }
    query = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        found["gpu"] = dict(zip(query.split(","), said.splitlines()[0].split(", ")))
    return found


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
