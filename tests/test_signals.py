"""Stop signals outside of training: in the first second, in a process that hangs, and in threads."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
from conftest import REPOSITORY
from test_loader import configure, rank

from trainer.data.loader import TrainingBatches, open_data
from trainer.plan import Plan
from trainer.signals import STOP_SIGNALS

# Locks a mutex twice: unlike most calls, this one returns for no signal, as a collective does not.
DEADLOCK = """
import ctypes
from trainer.signals import StopSignals
with StopSignals():
    mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
"""


def masked(status: str, field: str) -> set[int]:
    """The signals in a mask of /proc/PID/status."""
    bits = int(re.search(rf"^{field}:\s*(\w+)", status, re.M)[1], 16)
    return {number for number in range(1, 65) if bits >> (number - 1) & 1}


def test_a_second_interrupt_ends_a_process_that_hangs() -> None:
    with subprocess.Popen([sys.executable, "-c", DEADLOCK], cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(2)  # the first one waits for a step boundary
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()


def test_a_signal_before_torch_is_imported_stops_the_run_in_words(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("{}")
    options = ["data.source=synthetic", "model.name=resnet20", f"output_dir={tmp_path / 'run'}", "loop.eval_every=0"]
    command = [sys.executable, "-m", "trainer", "train", str(tmp_path / "empty.yaml"), *options]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        try:
            proc = Path(f"/proc/{process.pid}")
            while signal.SIGTERM not in masked((proc / "status").read_text(), "SigCgt") and process.poll() is None:
                time.sleep(0.005)
            assert "libtorch" not in (proc / "maps").read_text()
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=250)
        finally:
            process.kill()
    assert process.returncode == 75
    assert output == "stopped by SIGTERM before the first step; the same command goes on\n"
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_dalis_threads_leave_stop_signals_to_the_main_thread(tiny: Path) -> None:
    config = configure(tiny)
    data = open_data(config, rank(0, 1))
    before = set(os.listdir("/proc/self/task"))
    batches = TrainingBatches(config, data, Plan.of(config, 1, data.samples), rank(0, 1), 0)
    list(islice(batches, 2))
    threads = set(os.listdir("/proc/self/task")) - before
    assert threads
    for thread in threads:
        status = Path(f"/proc/self/task/{thread}/status").read_text()
        assert set(STOP_SIGNALS) <= masked(status, "SigBlk"), status.splitlines()[0]
    assert not set(STOP_SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, ())
