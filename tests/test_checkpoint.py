"""Checkpoints are whole or absent, whenever the process dies; and which of them stay."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from trainer import checkpoint
from trainer.checkpoint import Label
from trainer.config import ConfigError
from trainer.retention import Retention


def state(value: float = 1.0) -> dict:
    return {"model": {"w": torch.full((100,), value)}, "progress": {"step": 3}, "classes": ["a", "b"], "none": None}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 7, state(2.5), Label(top1=61.5))
    (found,) = checkpoint.listing(tmp_path)
    assert (found.step, found.top1) == (7, 61.5)
    loaded = checkpoint.load(checkpoint.newest_whole(tmp_path))
    assert torch.equal(loaded["model"]["w"], torch.full((100,), 2.5))
    assert loaded["progress"] == {"step": 3} and loaded["classes"] == ["a", "b"] and loaded["none"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["000000007"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest_whole(tmp_path) is None
    assert checkpoint.newest_whole(tmp_path / "absent") is None


def damage_flip(folder: Path) -> None:
    content = bytearray((folder / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "state.pt").write_bytes(content)


def damage_cut(folder: Path) -> None:
    os.truncate(folder / "state.pt", 100)


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def damage_version(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))


def damage_json(folder: Path) -> None:
    (folder / "manifest.json").write_text("[1]")


def damage_name(folder: Path) -> None:
    """Copied by hand to become the newest: its step would never be reached again."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"step": 9}))


def resealed(folder: Path, content: object) -> None:
    """Another state under a manifest that is right."""
    torch.save(content, folder / "state.pt")
    data = (folder / "state.pt").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


class Hostile:
    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self):
        return os.mkdir, (self._path,)


def damage_hostile(folder: Path) -> None:
    resealed(folder, {"model": Hostile(folder.parent / "ran")})


def damage_list(folder: Path) -> None:
    resealed(folder, [1, 2])


def damage_model(folder: Path) -> None:
    resealed(folder, state() | {"model": {"w": torch.zeros(7)}})


def accept_ours(found: dict) -> None:
    if found["model"]["w"].shape != (100,):
        raise ConfigError("model.w is another")


BAD = [damage_flip, damage_cut, damage_manifest, damage_version, damage_json, damage_name]
BAD += [damage_hostile, damage_list, damage_model]


@pytest.mark.parametrize("damage", BAD)
def test_a_bad_one_is_named_and_the_one_before_taken(tmp_path: Path, damage, capsys) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    checkpoint.save(tmp_path, 2, state(2))
    damage(tmp_path / "000000002")
    assert checkpoint.newest_whole(tmp_path, accept_ours).name == "000000001"
    said = capsys.readouterr().err
    assert re.fullmatch(r"warning: .*000000002.*; falling back to 000000001\n", said), said
    damage(tmp_path / "000000001")
    with pytest.raises(ConfigError, match=r"no checkpoint in .* can be used \(.*000000001"):
        checkpoint.newest_whole(tmp_path, accept_ours)
    assert re.fullmatch(r"warning: .*000000002.*\n", capsys.readouterr().err)
    assert not (tmp_path / "ran").exists()


def steps(folder: Path) -> list[int]:
    return [found.step for found in checkpoint.listing(folder)]


def test_the_newest_the_best_and_the_lasting_are_kept(tmp_path: Path) -> None:
    retention = Retention(tmp_path, keep=2)
    labels = [(1, Label(top1=50.0, lasting=True)), (2, Label(top1=70.0)), (3, Label(top1=60.0)), (4, Label())]
    for step, label in [*labels, (5, Label(top1=65.0))]:
        checkpoint.save(tmp_path, step, state(), label)
        retention.prune()
    assert steps(tmp_path) == [1, 2, 4, 5]
    assert {p.name for p in tmp_path.iterdir()} == {f"{step:09d}" for step in (1, 2, 4, 5)}


@pytest.mark.parametrize("trusted", [True, False])
def test_a_damaged_one_never_costs_a_good_one_its_place(tmp_path: Path, trusted: bool) -> None:
    retention = Retention(tmp_path, keep=2)
    for step in (1, 2, 3):
        path = checkpoint.save(tmp_path, step, state(), Label(top1=float(step)))
        if trusted:
            retention.trust(path)
    damage_flip(tmp_path / "000000003")  # the newest and the best
    retention.prune()
    assert steps(tmp_path) == [1, 2, 3]
    damage_cut(tmp_path / "000000002")
    retention.prune()
    assert steps(tmp_path) == [1, 2, 3]
    checkpoint.save(tmp_path, 4, state())
    checkpoint.save(tmp_path, 5, state())
    retention.prune()
    assert steps(tmp_path) == [1, 4, 5]  # 1 is now the best that is whole


@pytest.mark.parametrize("operation", ["fsync", "rename"])
def test_a_save_that_fails_leaves_the_one_before_and_nothing_else(tmp_path: Path, monkeypatch, operation: str) -> None:
    checkpoint.save(tmp_path, 1, state())

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, operation, full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, state())
    assert [p.name for p in tmp_path.iterdir()] == ["000000001"]
    assert checkpoint.newest_whole(tmp_path).name == "000000001"


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    for value in (1, 2, 3):
        checkpoint.save(tmp_path, 4, state(value), Label(top1=9.0))
    Retention(tmp_path, keep=2).prune()
    assert [p.name for p in tmp_path.iterdir()] == ["000000004"]
    assert checkpoint.load(tmp_path / "000000004")["model"]["w"][0] == 3


# Saves step 3, or step 2 again, in a fork that dies at its n-th file operation; then looks what is there, and saves on.
KILLED_AT_EACH_OPERATION = """
import builtins, itertools, os, pathlib, shutil, sys, torch
from trainer import checkpoint
from trainer.retention import Retention

folder, again = pathlib.Path(sys.argv[1]), sys.argv[2] == "again"
state = lambda value: {"model": {"w": torch.full((20_000,), float(value))}}
left, seen = 0, set()

def deadly(name, call):
    def wrapped(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            if name == "write":  # the disk took half of it
                call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                arguments[0]._file.flush()
            os._exit(9)
        return call(*arguments, **options)
    return wrapped

def die_at(n):
    global left
    left = n
    builtins.open = deadly("open", open)
    for name in ("open", "fsync", "rename", "mkdir", "unlink", "rmdir", "close", "scandir"):
        setattr(os, name, deadly(name, getattr(os, name)))
    checkpoint._Written.write = deadly("write", checkpoint._Written.write)

def save(step, value):
    checkpoint.save(folder, step, state(value))
    Retention(folder, keep=1).prune()

for n in itertools.count(1):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    checkpoint.save(folder, 1, state(1))
    checkpoint.save(folder, 2, state(2))
    child = os.fork()
    if child == 0:
        die_at(n)
        save(2 if again else 3, 3)
        os._exit(0)
    finished = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    newest = checkpoint.newest_whole(folder)
    value = checkpoint.load(newest)["model"]["w"]
    assert (value == value[0]).all() and value[0] in (2, 3), (n, newest, value[0])
    seen.add(float(value[0]))
    save(4, 4)
    assert [p.name for p in folder.iterdir()] == ["000000004"], (n, list(folder.iterdir()))
    if finished:
        break
assert n > 30 and seen == {2, 3}, (n, seen)
print(n, "operations")
"""


@pytest.mark.parametrize("case", ["new", "again"])
def test_killed_at_any_file_operation_of_a_save_the_next_start_finds_a_whole_one(tmp_path: Path, case: str) -> None:
    command = [sys.executable, "-c", KILLED_AT_EACH_OPERATION, str(tmp_path / "checkpoints"), case]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "operations" in done.stdout, done.stderr
    assert not done.stderr, "nothing damaged was met"
