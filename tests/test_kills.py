"""Runs of two ranks that are killed, put to sleep, or have no room to save: what the next start makes of them.

Ranks are forked from a process that has imported torch: a life takes about a second instead of five.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import metrics, summary

from trainer import checkpoint

pytestmark = pytest.mark.end_to_end
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["trainer.train", "torch._dynamo"])
PATIENCE = 150.0  # seconds until a rank must have got somewhere, on a machine that is busy with other things
SAVES = ["checkpoint.every_steps=1", "report.log_every=1", "report.wandb=disabled", "loop.eval_every=0"]
NET = ["model.name=resnet20", "model.drop_path_rate=0.2", "precision.amp=fp32", "optim.lr=0.01", "global_batch_size=8"]
NET += ["data.source=synthetic", "data.synthetic_classes=4", "data.synthetic_samples=100", "data.image_size=16"]


def live(folder: Path, options: list[str], environment: dict[str, str], log: Path, room: int | None) -> None:
    """One rank's life, in a process of its own."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    if room is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    from trainer.__main__ import main

    (folder / "empty.yaml").touch()
    run = f"output_dir={folder / 'run'}"
    sys.exit(main(["train", str(folder / "empty.yaml"), run, *NET, *SAVES, *options]))


class Life:
    """The ranks of one start of a run."""

    def __init__(
        self, folder: Path, *options: str, ranks: int = 2, room: int | None = None, slurm: tuple[int, int] | None = None
    ) -> None:
        """
        Args:
            room: bytes that a file may have.
            slurm: job id and restart count.
        """
        folder.mkdir(exist_ok=True)
        self.log = folder / f"log.{len(list(folder.glob('log.*')))}"
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        with socket.create_server(("127.0.0.1", 0)) as free:
            shared["MASTER_PORT"] = str(free.getsockname()[1])
        if slurm:
            shared |= {"SLURM_JOB_ID": str(slurm[0]), "SLURM_RESTART_COUNT": str(slurm[1])}
        self.ranks = []
        for rank in range(ranks):
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = FORKED.Process(target=live, args=(folder, list(options), environment, self.log, room))
            process.start()
            self.ranks.append(process)

    def end(self) -> list[int | None]:
        """The exit statuses, once all ranks have ended by themselves; negative: by a signal."""
        deadline = time.monotonic() + PATIENCE
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        assert all(process.exitcode is not None for process in self.ranks), f"a rank hangs: {self.log.read_text()}"
        return [process.exitcode for process in self.ranks]

    def end_as_torchrun_would(self, grace: float = 5.0) -> None:
        """Wait for who can tell that another is gone; kill the others: in a rendezvous they would wait for minutes."""
        for process in self.ranks:
            process.join(grace)
        self.kill()

    def signal(self, number: signal.Signals, rank: int = 0) -> None:
        os.kill(self.ranks[rank].pid, number)

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
            process.join()


@contextlib.contextmanager
def life(folder: Path, *options: str, **more: object) -> Iterator[Life]:
    """A `Life` that leaves no process behind."""
    begun = Life(folder, *options, **more)
    try:
        yield begun
    finally:
        begun.kill()


def wait_for(event: Callable[[], bool], begun: Life) -> None:
    deadline = time.monotonic() + PATIENCE
    while not event():
        assert time.monotonic() < deadline and begun.ranks[0].is_alive(), begun.log.read_text()
        time.sleep(0.005)


def steps(folder: Path) -> list[int]:
    return [found.step for found in checkpoint.listing(folder / "run" / "checkpoints")]


def saved(folder: Path) -> dict:
    return checkpoint.load(checkpoint.newest_whole(folder / "run" / "checkpoints"))


def equal(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


@pytest.fixture(scope="module")
def start_up(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds from a start to its first save, here and now; also sets the process up that ranks are forked from."""
    for name in ("cold", "warm"):
        folder = tmp_path_factory.mktemp(name) / "one"
        with life(folder, "loop.max_steps=1000") as begun:
            began = time.monotonic()
            wait_for(lambda folder=folder: bool(steps(folder)), begun)
    return time.monotonic() - began


@pytest.mark.parametrize(
    ("kills", "end"), [(3, 40), pytest.param(50, 600, marks=[pytest.mark.faults, pytest.mark.timeout(1800)])]
)
def test_killed_at_random_and_started_again_is_bitwise_never_killed(
    tmp_path: Path, start_up: float, kills: int, end: int
) -> None:
    options, draw = [f"loop.max_steps={end}"], random.Random(kills)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with life(whole, *options) as begun:
        assert begun.end() == [0, 0], begun.log.read_text()
    for number in range(kills):
        before = max(steps(broken), default=0)
        with life(broken, *options) as begun:
            if number % 2:  # in the start, or in the first steps
                time.sleep(draw.uniform(0, 1.5 * start_up))
            else:  # with saves under way
                wait_for(lambda before=before: max(steps(broken), default=0) > before, begun)
                time.sleep(draw.uniform(0, 0.2))
            victims = draw.choice([[0], [1], [0, 1]])
            assert all(begun.ranks[rank].exitcode is None for rank in victims), begun.log.read_text()
            for rank in victims:
                begun.signal(signal.SIGKILL, rank)
            begun.end_as_torchrun_would()
        if before:
            assert max(steps(broken)) >= before and saved(broken)
    with life(broken, *options) as begun:
        assert begun.end() == [0, 0], begun.log.read_text()
    ours, theirs = saved(broken), saved(whole)
    for part in ("model", "optimizer", "ranks", "scaler"):
        assert equal(ours[part], theirs[part]), part
    curves = [[(r["step"], r["loss"], r["lr"]) for r in metrics(folder / "run", "train")] for folder in (broken, whole)]
    assert curves[0] == curves[1] and len(curves[0]) == end
    assert "falling back" not in "".join(log.read_text() for log in broken.glob("log.*"))


def test_an_attempt_that_sleeps_through_its_takeover_writes_nothing_more(tmp_path: Path, start_up: float) -> None:
    with life(tmp_path, "loop.max_steps=100000", ranks=1, slurm=(7, 0)) as first:
        wait_for(lambda: bool(steps(tmp_path)), first)
        first.signal(signal.SIGSTOP)
        asleep_at = max(steps(tmp_path))
        with life(tmp_path, f"loop.max_steps={asleep_at + 3}", ranks=1, slurm=(7, 1)) as second:
            assert second.end() == [0], second.log.read_text()
        first.signal(signal.SIGCONT)
        assert first.end() == [1]
    said = first.log.read_text()
    assert "was taken over by process" in said and "Traceback" not in said
    assert summary(tmp_path / "run")["status"] == "done" and max(steps(tmp_path)) == asleep_at + 3
    assert metrics(tmp_path / "run", "train")[-1]["step"] == asleep_at + 3


def test_without_room_to_save_the_run_goes_on_and_says_so_at_the_end(tmp_path: Path, start_up: float) -> None:
    options = ["loop.max_steps=4", "checkpoint.every_steps=2"]
    with life(tmp_path, *options, ranks=1, room=1 << 20) as begun:
        assert begun.end() == [1]
    said = begun.log.read_text()
    assert all(f"warning: step {n} is not saved (File too large)" in said for n in (2, 4)), said
    assert "error: step 4 is not saved, at the second try either" in said and "Traceback" not in said
    assert [r["step"] for r in metrics(tmp_path / "run", "train")] == [1, 2, 3, 4]
    assert summary(tmp_path / "run")["status"] == "failed" and not steps(tmp_path)
    with life(tmp_path, *options, ranks=1) as begun:
        assert begun.end() == [0], begun.log.read_text()
    assert steps(tmp_path) == [2, 4]
