"""The lease of a run folder: who may enter, and who has lost it. Other hosts are written by hand."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import REPOSITORY

from trainer.config import ConfigError
from trainer.report.folder import RunFolder
from trainer.report.lease import FolderLostError, Holder, Lease

ELSEWHERE = Holder(host="node7", pid=4242, boot="another kernel", nonce="aa", job=None, restarts=0)


class Pause:
    """Stands in for waiting; `beats` is whether the holder's heart beats meanwhile."""

    def __init__(self, folder: Path, *, beats: bool = False) -> None:
        self.folder, self.beats, self.seconds = folder, beats, 0.0

    def __call__(self, seconds: float) -> None:
        self.seconds += seconds
        if self.beats:
            (self.folder / f".heartbeat.{ELSEWHERE.nonce}").write_text(f"{self.seconds}\n")


def held_by(folder: Path, holder: Holder) -> None:
    (folder / "lease.json").write_text(json.dumps(asdict(holder)))
    (folder / f".heartbeat.{holder.nonce}").write_text("0\n")


def take(folder: Path, *, beats: bool = False, locked: bool = True) -> tuple[Lease, float]:
    """The lease, and the seconds waited for it."""
    pause = Pause(folder, beats=beats)
    lease = Lease(folder, pause=pause)
    lease.take(locked=locked)
    return lease, pause.seconds


def test_a_holder_on_another_host_that_lives_is_left_alone(tmp_path: Path) -> None:
    held_by(tmp_path, ELSEWHERE)
    before = (tmp_path / "lease.json").read_text()
    with pytest.raises(ConfigError, match=r"in use by process 4242 on node7: wait for it or choose another"):
        take(tmp_path, beats=True)
    assert (tmp_path / "lease.json").read_text() == before


def test_a_dead_holder_on_another_host_blocks_for_two_heartbeats_whatever_the_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    held_by(tmp_path, ELSEWHERE)
    for name in ("time", "time_ns"):
        monkeypatch.setattr(time, name, lambda: -1e9)  # a clock that jumped, or is years from the other host's
    os.utime(tmp_path / ".heartbeat.aa", (2e9, 2e9))
    lease, waited = take(tmp_path)
    assert waited == 20 and lease.read() == lease.me
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "left by process 4242 on node7: watching its heartbeat for 20 s" in said
    lease.release()


@pytest.mark.parametrize(
    ("change", "locked", "waits"),
    [
        ({"released": True}, True, False),
        ({"job": "77", "restarts": 1}, True, False),  # SLURM has started us in its place
        ({"job": "77", "restarts": 2}, True, True),
        ({"job": "78", "restarts": 1}, True, True),
        ({"host": "here"}, True, True),  # rebooted, or another machine of that name
        ({"host": "here", "boot": "ours", "pid": 1}, True, False),  # the kernel's lock is ours: it is dead
        ({"host": "here", "boot": "ours", "pid": 1}, False, True),  # no locks on this file system, and it runs
        ({"host": "here", "boot": "ours", "pid": 2**22 + 1}, False, False),  # no such process
        ({"host": "container", "boot": "ours", "pid": 2**22 + 1}, False, True),  # its processes have other numbers
    ],
)
def test_who_is_known_to_be_dead_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, locked: bool, waits: bool
) -> None:
    us = Holder(host="here", pid=os.getpid(), boot="ours", nonce="bb", job="77", restarts=2)
    monkeypatch.setattr(Holder, "this", classmethod(lambda cls: us))
    held_by(tmp_path, replace(ELSEWHERE, **change))
    lease, waited = take(tmp_path, locked=locked)
    assert bool(waited) == waits
    lease.release()
    assert lease.read().released and {p.name for p in tmp_path.iterdir()} == {"lease.json"}


def test_a_lease_that_cannot_be_read_counts_for_nothing_and_is_named(tmp_path: Path, capsys) -> None:
    (tmp_path / "lease.json").write_text('{"host": "x"')
    lease, waited = take(tmp_path)
    assert not waited and re_line(capsys.readouterr().err, "lease.json is not a lease")
    lease.release()


def re_line(text: str, part: str) -> bool:
    return part in text and text.count("\n") == 1


def test_who_was_taken_for_dead_is_told_and_does_not_beat_again(tmp_path: Path) -> None:
    first = Lease(tmp_path, interval=0.02)
    first.take(locked=True)
    beat = tmp_path / f".heartbeat.{first.me.nonce}"
    counted = beat.read_text()
    deadline = time.monotonic() + 20
    while beat.read_text() == counted and time.monotonic() < deadline:
        time.sleep(0.02)
    assert beat.read_text() != counted
    first.demand()
    second, _ = take(tmp_path)
    with pytest.raises(FolderLostError, match=rf"taken over by process {os.getpid()} on"):
        first.demand()
    time.sleep(0.1)
    first.release()
    assert not beat.exists() and second.read() == second.me
    second.demand()
    second.release()
    with pytest.raises(FolderLostError):
        first.me = replace(ELSEWHERE)
        first.demand()


def test_a_folder_that_vanished_is_not_taken_for_lost_and_is_not_made_anew(tmp_path: Path, capsys) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.acquire()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(OSError, match="lease is gone"):
        folder.demand_held()
    folder.try_to_write("summary.json", {})
    folder.add_metrics({"step": 1})
    assert re_line(capsys.readouterr().err, "cannot be written (the lease is gone)")  # once
    folder.release()
    assert not (tmp_path / "run").exists()


def test_metrics_of_a_full_disk_are_left_out_by_whole_lines_and_said_once(tmp_path: Path, capsys) -> None:
    folder = RunFolder(tmp_path)
    folder.add_metrics({"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        folder.add_metrics({"step": 2})  # half of it fits
        folder.add_metrics({"step": 3})
        folder.try_to_write("summary.json", {"status": "done" * 10})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    folder.add_metrics({"step": 4})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 4}\n'
    assert re_line(capsys.readouterr().err, "metrics.jsonl cannot be written (File too large)")
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl"}
    folder.release()


def test_a_folder_that_cannot_be_written_is_answered_in_one_line(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file cannot be written \(File exists\): make room or choose"):
        RunFolder(tmp_path / "file").acquire()

    def refuse(*arguments: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(ConfigError, match=r"cannot be written \(Read-only file system\)"):
        RunFolder(tmp_path / "run").acquire()


def test_slurms_next_attempt_enters_though_the_one_before_still_has_the_lock(tmp_path: Path) -> None:
    script = (
        "import sys, time; from trainer.report.folder import RunFolder\n"
        "folder = RunFolder(sys.argv[1]); folder.acquire(); print('held', flush=True)\n"
        "sys.stdin.readline(); folder.demand_held()"
    )
    environment = os.environ | {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, env=environment, **pipes) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"in use by process {first.pid} on .*, SLURM job 77"):
            RunFolder(tmp_path).acquire()
        environment["SLURM_RESTART_COUNT"] = "2"
        with subprocess.Popen(command, cwd=REPOSITORY, text=True, env=environment, **pipes) as second:
            assert second.stdout.readline() == "held\n"
            _, errors = first.communicate("\n", timeout=60)
            assert first.returncode == 1 and "FolderLostError" in errors
            # The first one's lock is gone with it; the second's own keeps a third out.
            with pytest.raises(ConfigError, match=rf"in use by process {second.pid} on"):
                RunFolder(tmp_path).acquire()
            second.communicate("\n", timeout=60)
        assert second.returncode == 0
