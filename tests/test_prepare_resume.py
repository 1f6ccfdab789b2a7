"""`prepare` stopped in every way it can be stopped: the same command goes on and ends with the same bytes."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import layouts
import pytest
from conftest import REPOSITORY
from layouts import Content, contents, drawn

from trainer.config import RunError
from trainer.data.index import DataError
from trainer.data.prepare import archives, pace, run, run_jobs, samples
from trainer.data.prepare.run import Options, prepare
from trainer.data.prepare.transcode import Encoding

FORMATS = ("folder", "shards")
ONE = {"workers": 1}


@pytest.fixture(scope="module")
def content() -> Content:
    return drawn()


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several units of work and several shards out of a few images."""
    monkeypatch.setattr(samples, "UNIT_FILES", 5)
    monkeypatch.setattr(archives, "UNIT_BYTES", 7000)
    monkeypatch.setattr(run, "_shard_number", lambda *_: 3)


def _dying(source: Path, home: Path, options: Options, calls: int) -> None:
    """Prepare, and be killed within the system call number `calls`."""
    real = {name: getattr(os, name) for name in ("pwrite", "replace", "mkdir")}
    left = [calls]

    def killing(name: str) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                if name == "pwrite":
                    real[name](arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], arguments[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real[name](*arguments, **options)

        return call

    for name in real:
        setattr(os, name, killing(name))
    prepare(source, home, options)


@pytest.mark.parametrize("encoding", [Encoding(), Encoding(short_side=24)], ids=["bytes", "copies"])
@pytest.mark.parametrize("format", FORMATS)
def test_killed_anywhere_it_goes_on_to_the_same_result(
    format: str, encoding: Encoding, tmp_path: Path, small_units: None
) -> None:
    source = layouts.archives(tmp_path / "source", drawn(3, 12, 5))
    options = Options(format, encoding, 1, **ONE)
    prepare(source, tmp_path / "straight", options)
    wanted = contents(tmp_path / "straight")
    random.seed(f"{format}{encoding}")
    killed = 0
    for trial in range(5):
        home, deaths = tmp_path / f"killed{trial}", 0
        while True:
            process = multiprocessing.get_context("fork").Process(
                target=_dying, args=(source, home, options, random.randrange(2, 40))
            )
            process.start()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            deaths += 1
            if deaths > 20:  # so that a unit which needs more calls than we grant ends too
                prepare(source, home, options)
                break
        killed += deaths
        assert contents(home) == wanted
    assert killed > 5


def test_a_killed_command_with_workers_goes_on(tmp_path: Path) -> None:
    source = layouts.image_folder(tmp_path / "source", drawn(3, 300, 20))
    options = Options("folder", Encoding(short_side=30), workers=2)
    script = (
        "import sys; from trainer.data.prepare.run import *\n"
        "if __name__ == '__main__':\n"
        "    prepare(sys.argv[1], sys.argv[2], Options('folder', Encoding(short_side=30), workers=2))\n"
    )
    (tmp_path / "command.py").write_text(script)
    start = [sys.executable, str(tmp_path / "command.py"), str(source), str(tmp_path / "to")]
    process = subprocess.Popen(start, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    while process.poll() is None and not list((tmp_path / "to").glob("train/*/*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "to" / ".prepare" / "state.json").exists()
    prepare(source, tmp_path / "to", options)
    prepare(source, tmp_path / "straight", options)
    assert contents(tmp_path / "to") == contents(tmp_path / "straight")


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_stops_clearly_and_resumes(
    format: str, tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = layouts.kaggle(tmp_path / "source", drawn(3, 12, 5))
    options = Options(format, shard_mb=1, **ONE)
    prepare(source, tmp_path / "straight", options)
    real, left = os.pwrite, [0]

    def filling(descriptor: int, data: bytes, offset: int) -> int:
        part = bytes(data)[: max(0, left[0])]
        left[0] -= len(data)
        if len(part) < len(data):
            real(descriptor, part, offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    random.seed(format)
    stops = 0
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", filling)
        while stops < 100:
            left[0] = random.randrange(5_000, 25_000)
            try:
                prepare(source, tmp_path / "to", options)
                break
            except DataError as error:
                assert "the disk is full" in str(error) and "run the same command again" in str(error)
                assert "\n" not in str(error)
                stops += 1
                for path in (tmp_path / "to").glob("[tv]*/*/*"):
                    assert path.read_bytes() in content_bytes(source)
    assert stops > 2
    assert contents(tmp_path / "to") == contents(tmp_path / "straight")


def content_bytes(source: Path) -> set[bytes]:
    return {path.read_bytes() for path in source.rglob("*.JPEG")}


def test_what_is_done_is_left_alone(content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, home = layouts.tiny(tmp_path / "source", content), tmp_path / "to"
    assert not prepare(source, home, Options(**ONE)).already
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    again = prepare(source, home, Options(**ONE))
    assert again.already and "is there already, whole" in again.text
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before
    with pytest.raises(DataError, match="with --format folder, now shards"):
        prepare(source, home, Options("shards", **ONE))
    next((home / "val").glob("*/*")).unlink()
    with pytest.raises(DataError, match=r"holds 3 files .* written were 4"):
        prepare(source, home, Options(**ONE))


def test_what_goes_wrong_in_a_worker_is_one_line_too(
    content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, home = layouts.tiny(tmp_path / "source", content), tmp_path / "to"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, home, Options(**ONE), progress=stop)
    (home / "train").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be written: .* run the same command again"):
        prepare(source, home, Options(workers=2))
    (home / "train").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(run, "_work", _killed)
        with pytest.raises(RunError, match=r"a worker process was killed, .*fewer --workers"):
            prepare(source, home, Options(workers=2))
    assert prepare(source, home, Options(workers=2)).report["problems"] == []


def _killed(job: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_one_process_at_a_time(content: Content, tmp_path: Path) -> None:
    source, home = layouts.tiny(tmp_path / "source", content), tmp_path / "to"

    def meanwhile(*_: object) -> None:
        with pytest.raises(DataError, match="another process prepares"):
            prepare(source, home, Options(**ONE))

    prepare(source, home, Options(**ONE), progress=meanwhile)


def test_pace_says_rate_and_time_left() -> None:
    stream, now = io.StringIO(), [0.0]
    tell = pace.pace(2.0, stream, lambda: now[0])
    for second, done in ((0, 100), (1, 110), (4, 140), (5, 150), (100, 400)):
        now[0] = float(second)
        tell("preparing", done, 500, 10 * done)
    assert stream.getvalue().splitlines() == [
        "preparing: 28.0 %, 1,400 images, 100 images/s, 36 s left",
        "preparing: 80.0 %, 4,000 images, 30 images/s, 33 s left",
    ]
    assert (pace.span(700), pace.span(11_100)) == ("12 min", "3 h 05 min")


def test_jobs_are_not_taken_ahead_of_their_results() -> None:
    taken = []
    jobs = (taken.append(number) or number for number in range(100))
    results = run_jobs(abs, jobs, 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2] and len(taken) <= 7
    results.close()
