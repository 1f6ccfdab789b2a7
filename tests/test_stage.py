"""Staging: the same rows from another disk, whole or not at all, and never more than the disk has room for."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, here
from test_loader import configure, rank, steps

from trainer.config import ConfigError
from trainer.data import stage as module
from trainer.data.index import open_shards
from trainer.data.loader import open_data
from trainer.data.room import room
from trainer.data.stage import stage
from trainer.data.table import DataError
from trainer.signals import Stopped


@pytest.fixture(scope="module")
def sharded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` as shards made by `prepare`, with their sha256."""
    root = tmp_path_factory.mktemp("sharded")
    assert here("prepare", tiny, root, "--format", "shards", "--workers", 1).status == 0
    return root


@pytest.fixture
def many(sharded: Path, tmp_path: Path) -> Path:
    """A source with six shards, of one's own to change."""
    source = tmp_path / "source"
    source.mkdir()
    (shard,) = sharded.glob("train-*.tar")
    for number in range(6):
        (source / f"train-{number:06}.tar").write_bytes(shard.read_bytes())
    lines = [{"name": f"train-{number:06}.tar", "sha256": _sha256(shard)} for number in range(6)]
    (source / "train.index.json").write_text(json.dumps({"shards": lines}))
    return source


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def staged_files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != ".staging.lock")


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_the_run_is_that_of_the_source(kind: str, tiny: Path, sharded: Path, tmp_path: Path) -> None:
    root = tiny if kind == "folder" else sharded
    options = (f"data.stage_to={tmp_path}", "data.stage_reserve_gb=0")
    before = open_data(configure(root), rank(0, 1))
    after = open_data(configure(root, *options), rank(0, 1))
    assert after.digest == before.digest and after.classes == before.classes
    for here_, there in ((after.train, before.train), (after.val, before.val)):
        assert here_.root.parent == tmp_path and (here_.labels == there.labels).all()
        assert Path(here_.root, *here_.shard_files[:1]).exists()
    # The source is not read any more: its pixels come from the copies, row by row.
    found = [steps(configure(root, *extra), rank(0, 1), 0, 3) for extra in ((), options)]
    assert all(torch.equal(a, b) for x, y in zip(*found) for a, b in zip(x, y))
    if kind == "folder":
        assert all(Path(path).is_relative_to(tmp_path) for path in after.val.paths(np.arange(23)))


def test_whole_files_are_kept_and_the_others_made_anew(many: Path, tmp_path: Path) -> None:
    index = open_shards(many, "train")
    said = []
    (first,) = stage([index], tmp_path / "to", 0, lambda *words: said.append(words))
    names = sorted(p.name for p in many.glob("*.tar"))
    total = sum((many / name).stat().st_size for name in names)
    assert said[-1] == (f"staging {many}", total, total, len(index)) and len(said) == 6
    assert [_sha256(first.root / name) for name in names] == [_sha256(many / name) for name in names]
    made = {name: (first.root / name).stat().st_mtime_ns for name in names}

    (again,) = stage([index], tmp_path / "to", 0, lambda *_: pytest.fail("copied once more"))
    assert again.root == first.root
    (first.root / names[1]).unlink()
    os.truncate(first.root / names[3], 1000)  # as nothing of ours would leave it
    (first.root / f".{names[5]}.part").write_bytes(b"by a run that was killed")
    said.clear()
    stage([index], tmp_path / "to", 0, lambda *words: said.append(words))
    assert len(said) == 2 and said[0][1] > total // 2, "what is there counts as done"
    assert {n for n in names if (first.root / n).stat().st_mtime_ns != made[n]} == {names[1], names[3]}
    assert staged_files(first.root) == names and _sha256(first.root / names[3]) == _sha256(many / names[3])


def test_a_changed_source_is_staged_beside_the_old_one(many: Path, tmp_path: Path) -> None:
    (before,) = stage([open_shards(many, "train")], tmp_path / "to", 0)
    os.utime(many / "train-000002.tar", ns=(1, 1))
    (after,) = stage([open_shards(many, "train")], tmp_path / "to", 0)
    assert after.root != before.root and after.digest == before.digest
    assert len(staged_files(before.root)) == len(staged_files(after.root)) == 6


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-512] + bytes(511) + b"x"), r"its sha256 differs"),
        (lambda shard: os.truncate(shard, 5000), r"has 5,000 bytes, not [\d,]+ as when the set was indexed"),
        (lambda shard: shard.with_name("train.index.json").write_text("{}"), r"train\.index\.json cannot be read"),
    ],
)
def test_a_source_that_is_not_what_it_was_is_named(many: Path, tmp_path: Path, harm, message: str) -> None:
    index = open_shards(many, "train")
    copy = module._Copy(index, tmp_path / "to")
    harm(many / "train-000004.tar")
    with pytest.raises(DataError, match=message) as error:
        copy.make(copy.missing(), 0, None)
    assert "\n" not in str(error.value)
    assert not (copy.home / "train-000004.tar").exists() and not list(tmp_path.rglob("*.part"))


def test_no_room_is_said_before_anything_is_copied(many: Path, tmp_path: Path) -> None:
    index = open_shards(many, "train")
    free = room(tmp_path)
    with pytest.raises(DataError, match=r"has [\d,.]+ GB free, the set needs [\d.]+ GB there, and .* are to stay free"):
        stage([index], tmp_path / "to", free - 1000)
    assert staged_files(tmp_path / "to") == [] and os.listdir(tmp_path / "to") == [".staging.lock"]
    config = configure(many, "loop.eval_every=0", f"data.stage_to={tmp_path / 'to'}", "data.stage_reserve_gb=1e9")
    with pytest.raises(ConfigError, match=r"1,000,000,000\.00 GB are to stay free \(data\.stage_reserve_gb\)"):
        open_data(config, rank(0, 1))


@pytest.mark.parametrize("how", ["reserve", "error"])
def test_a_disk_that_others_fill_meanwhile_is_left_empty(
    many: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_shards(many, "train")
    calls = iter([10**9] * 4 + [0] * 100)  # room for the check and three shards
    monkeypatch.setattr(module, "room", lambda _: next(calls))
    if how == "error":

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module, "room", lambda _: 10**9)
        monkeypatch.setattr(module, "_CHUNK", 1)  # so that the files count as large, and are synced
        monkeypatch.setattr(module, "_chunks", lambda path: [path.read_bytes()])
        monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(DataError, match=r"was filled by something else while .* its copy is removed"):
        stage([index], tmp_path / "to", 0)
    assert os.listdir(tmp_path / "to") == [".staging.lock"]


def test_room_in_memory_is_bounded_by_the_node_and_the_group(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / name).write_text(text)

    folder = tmp_path / "memory" / "inner"
    folder.mkdir(parents=True)
    write("proc/meminfo", "MemTotal: 9 kB\nMemAvailable: 2000 kB\n")
    write("proc/self/mounts", f"root / ext4 rw 0 0\ntmpfs {tmp_path / 'other'} tmpfs rw 0 0\n")
    assert room(folder, tmp_path / "s") > 10**8, "a disk"
    write("proc/self/mounts", f"root / ext4 rw 0 0\ntmpfs {tmp_path / 'memory'} tmpfs rw 0 0\n")
    assert room(folder, tmp_path / "s") == 2000 << 10
    write("proc/self/cgroup", "5:cpu,memory:/job\n0::/slice/step\n")
    write("sys/fs/cgroup/slice/step/memory.max", "max\n")
    write("sys/fs/cgroup/slice/memory.max", "1000000\n")
    write("sys/fs/cgroup/slice/memory.current", "700000\n")
    write("sys/fs/cgroup/slice/memory.stat", "anon 5\nactive_file 10000\ninactive_file 90000\n")
    assert room(folder, tmp_path / "s") == 400_000
    write("sys/fs/cgroup/memory/job/memory.limit_in_bytes", "500000\n")
    write("sys/fs/cgroup/memory/job/memory.usage_in_bytes", "300000\n")
    write("sys/fs/cgroup/memory/job/memory.stat", "inactive_file 7\ntotal_inactive_file 50000\n")
    assert room(folder, tmp_path / "s") == 250_000
    assert room(Path("/dev/shm")) <= os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_frsize


def test_one_copies_while_the_others_wait(many: Path, tmp_path: Path) -> None:
    index = open_shards(many, "train")
    (tmp_path / "to").mkdir()
    lock = open(tmp_path / "to" / ".staging.lock", "w")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    found, said = [], []
    with pytest.warns(UserWarning, match=r"another process copies into .*to: waiting"):
        waiting = [
            threading.Thread(target=lambda: found.extend(stage([index], tmp_path / "to", 0, lambda *w: said.append(w))))
            for _ in range(2)
        ]
        for thread in waiting:
            thread.start()
        time.sleep(0.3)
        assert not found and staged_files(tmp_path / "to") == []
        lock.close()
        for thread in waiting:
            thread.join(60)
    assert len(found) == 2 and found[0].root == found[1].root and len(said) == 6, "each shard was copied once"


def test_what_a_kill_leaves_is_gone_on_with(many: Path, tmp_path: Path) -> None:
    index = open_shards(many, "train")
    program = f"""
import os, signal
from pathlib import Path
from trainer.data import stage
from trainer.data.index import open_shards
chunks = stage._chunks
def slow(path):
    if path.name > "train-000002.tar":
        for chunk in chunks(path):
            yield chunk[:1000]
            os.kill(os.getpid(), signal.SIGKILL)
    yield from chunks(path)
stage._chunks, stage._THREADS = slow, 1
stage.stage([open_shards({str(many)!r}, "train")], {str(tmp_path / "to")!r}, 0)
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    (home,) = (path for path in (tmp_path / "to").iterdir() if path.is_dir())
    assert staged_files(home) == [".train-000003.tar.part", *(f"train-{n:06}.tar" for n in range(3))]
    said = []
    stage([index], tmp_path / "to", 0, lambda *words: said.append(words))
    assert len(said) == 3 and staged_files(home) == sorted(index.shard_files)


def test_a_signal_ends_it_and_the_next_start_goes_on(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(many, f"data.stage_to={tmp_path / 'to'}", "loop.eval_every=0")
    signs, stopped, chunks = [], threading.Event(), module._chunks

    def alive() -> None:
        signs.append(len(signs))
        if len(signs) == 2:
            stopped.set()
            raise Stopped(signal.SIGTERM)

    def slow(path: Path):
        if path.name > "train-000002.tar":
            assert stopped.wait(60)
            time.sleep(0.5)  # by then what has not begun is cancelled
        yield from chunks(path)

    monkeypatch.setattr(module, "_THREADS", 1)
    monkeypatch.setattr(module, "_chunks", slow)

    with pytest.raises(Stopped):
        open_data(config, rank(0, 1), alive=alive)
    (home,) = (path for path in (tmp_path / "to").iterdir() if path.is_dir())
    whole = staged_files(home)
    assert 2 <= len(whole) < 6
    assert open_data(config, rank(0, 1), alive=lambda: signs.append(None)).train.root == home
    assert signs[2:] == [None] * (6 - len(whole)) and len(staged_files(home)) == 6


def test_long_work_of_a_node_makes_no_rank_give_up_and_a_mistake_reaches_all(tmp_path: Path) -> None:
    """Two gloo ranks that wait 4 s at most for one another, and work of 6 s on the first of them."""
    program = """
import datetime, os, time
import torch
import torch.distributed as dist
from trainer import distributed
def work():
    if here.local_rank == 0:
        time.sleep(6)
    return here.rank
def mistake():
    if here.local_rank == 1:
        raise distributed.ConfigError("no room")
    return 0
dist.init_process_group("gloo")
number = int(os.environ["RANK"])
control = dist.new_group(timeout=datetime.timedelta(seconds=4))
here = distributed.World(number, number, 2, 2, torch.device("cpu"), control)
assert here.first_on_node(work) == number
try:
    here.first_on_node(mistake)
except distributed.ConfigError as error:
    print(error)
dist.destroy_process_group()
"""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=REPOSITORY,
            env={**os.environ, **common, "RANK": str(number), "LOCAL_RANK": str(number), "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
        )
        for number in (0, 1)
    ]
    try:
        assert [process.communicate(timeout=120)[0] for process in ranks] == ["no room\n"] * 2
    finally:
        for process in ranks:
            process.kill()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
