"""Saving in the background: what is saved, what happens when the disk refuses, who may save."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path

import pytest
import torch
from conftest import here

from trainer import checkpoint
from trainer.report.lease import FolderLostError
from trainer.saver import SaveError, Saver
from trainer.snapshot import Snapshot


def state(value: float, n: int = 1000) -> dict:
    return {"model": {"w": torch.full((n,), value)}, "step": int(value), "groups": [{"lr": value, "params": [0, 1]}]}


def saver(folder: Path, said: list[str] | None = None, permitted=checkpoint.always) -> Saver:
    return Saver(folder / "checkpoints", 2, permitted, (said if said is not None else []).append)


def newest(folder: Path) -> dict:
    return checkpoint.load(checkpoint.newest_whole(folder / "checkpoints"))


class Gate:
    """Stands in for a call that blocks until it is opened."""

    def __init__(self, call) -> None:
        self._call, self.reached, self.opened = call, threading.Event(), threading.Event()

    def __call__(self, *arguments):
        self.reached.set()
        assert self.opened.wait(30)
        return self._call(*arguments)


def test_a_save_holds_the_state_of_its_moment_and_training_goes_on(tmp_path: Path, monkeypatch) -> None:
    gate = Gate(os.fsync)
    monkeypatch.setattr(os, "fsync", gate)
    ours, live = saver(tmp_path), state(1)
    ours.reserve(lambda: live)
    ours.save(1, live)
    assert gate.reached.wait(30)  # the disk is busy, and we are here
    live["model"]["w"].fill_(2)
    live["groups"][0]["lr"] = 2.0
    assert checkpoint.listing(tmp_path / "checkpoints") == []
    gate.opened.set()
    ours.save(2, live)  # waits for the first: both are kept
    ours.finish()
    assert [found.step for found in checkpoint.listing(tmp_path / "checkpoints")] == [1, 2]
    first = checkpoint.load(tmp_path / "checkpoints" / "000000001")
    assert (first["model"]["w"] == 1).all() and first["groups"] == [{"lr": 1.0, "params": [0, 1]}]
    assert (newest(tmp_path)["model"]["w"] == 2).all()


def test_what_a_full_disk_refuses_is_said_and_tried_again_at_the_end(tmp_path: Path) -> None:
    # A limit on the size of files: the kernel refuses in the midst of the file, as a full disk does.
    said: list[str] = []
    ours = saver(tmp_path, said)
    ours.save(1, state(1))
    ours.close()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        for step in (2, 3):
            ours.save(step, state(step, n=1_000_000))
            ours.close()
            assert checkpoint.newest_whole(tmp_path / "checkpoints").name == "000000001"
            assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000000001"]
        ours.check()
        assert len(said) == 2 and all(
            f"warning: step {n} is not saved (File too large)" in line for n, line in zip((2, 3), said)
        ), said
        with pytest.raises(SaveError, match=r"step 3 is not saved, at the second try either"):
            ours.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    ours.finish()
    assert newest(tmp_path)["step"] == 3 and len(said) == 2


def test_nothing_is_written_into_a_folder_that_another_process_took_over(tmp_path: Path, monkeypatch) -> None:
    theirs = False

    def permitted() -> None:
        if theirs:
            raise FolderLostError("taken over")

    ours = saver(tmp_path, permitted=permitted)
    ours.save(1, state(1))
    ours.finish()
    gate = Gate(os.fsync)  # taken over while the file is on its way to the disk: the rename is not done any more
    monkeypatch.setattr(os, "fsync", gate)
    ours.save(2, state(2))
    assert gate.reached.wait(30)
    theirs = True
    gate.opened.set()
    ours.close()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000000001"]
    for call in (ours.check, ours.finish, lambda: ours.save(3, state(3))):
        with pytest.raises(FolderLostError):
            call()


def test_an_update_of_the_weights_waits_for_their_copy_and_nothing_else_does(tmp_path: Path, monkeypatch) -> None:
    weights = torch.nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.SGD([weights], lr=1.0)
    gate = Gate(Snapshot.complete)
    monkeypatch.setattr(Snapshot, "complete", lambda snapshot: gate(snapshot))
    ours, other = saver(tmp_path), torch.ones(1000)
    ours.guard(optimizer)
    ours.save(1, {"model": weights, "other": other}, still=frozenset({weights.data_ptr()}))
    weights.grad = other.clone()
    other.zero_()
    threading.Timer(0.2, gate.opened.set).start()
    assert not gate.opened.is_set()
    optimizer.step()
    assert gate.opened.is_set() and (weights == 0).all()
    ours.finish()
    assert (newest(tmp_path)["model"] == 1).all() and (newest(tmp_path)["other"] == 1).all()


def test_a_slow_copy_changes_nothing_of_what_a_run_saves(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "empty.yaml").touch()
    options = ["model.name=resnet20", "global_batch_size=4", "precision.amp=fp32", "optim.lr=0.01", "loop.max_steps=4"]
    options += ["data.source=synthetic", "data.synthetic_classes=4", "data.synthetic_samples=100", "data.image_size=16"]
    options += ["checkpoint.every_steps=1", "checkpoint.keep=9", "report.wandb=disabled", "loop.eval_every=0"]
    complete, settle, asked = Snapshot.complete, Snapshot.settle, threading.Event()

    def late(snapshot: Snapshot) -> None:
        asked.wait(2)  # until the next update is about to be made; long enough for it to be over if nobody asks
        asked.clear()
        complete(snapshot)

    def ask(snapshot: Snapshot) -> None:
        asked.set()
        settle(snapshot)

    for name in ("fast", "slow"):
        if name == "slow":
            monkeypatch.setattr(Snapshot, "complete", late)
            monkeypatch.setattr(Snapshot, "settle", ask)
        done = here("train", tmp_path / "empty.yaml", f"output_dir={tmp_path / name}", *options)
        assert done.status == 0, done.errors
    for step in range(1, 5):
        fast, slow = (checkpoint.load(tmp_path / name / "checkpoints" / f"{step:09d}") for name in ("fast", "slow"))
        assert all(torch.equal(fast["model"][key], slow["model"][key]) for key in fast["model"]), step
        moments = [state["optimizer"]["state"] for state in (fast, slow)]
        assert all(torch.equal(moments[0][i]["momentum_buffer"], moments[1][i]["momentum_buffer"]) for i in moments[0])


def test_a_mistake_of_ours_in_the_background_is_not_swallowed(tmp_path: Path) -> None:
    ours = saver(tmp_path)
    ours.save(1, {"model": threading})  # a module cannot be pickled
    with pytest.raises(TypeError):
        ours.finish()


def test_a_snapshot_keeps_layout_and_reuses_its_memory() -> None:
    snapshot, images = Snapshot(), torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    snapshot.reserve({"a": images})
    first = snapshot.take({"a": images, "b": [images[0, 0], (1, None)]})
    assert torch.equal(first["a"], images) and first["a"].stride() == images.stride()
    assert first["b"][1] == (1, None) and first["b"][0].data_ptr() != images.data_ptr()
    pointer, images = first["a"].data_ptr(), images + 1
    assert snapshot.take({"a": images})["a"].data_ptr() == pointer and torch.equal(first["a"], images)
    grown = snapshot.take({"a": torch.ones(7)})["a"]
    assert grown.shape == (7,)
