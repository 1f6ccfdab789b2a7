"""Checkpoints are whole or absent."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from trainer import checkpoint
from trainer.config import ConfigError


def state(value: float = 1.0) -> dict:
    return {"model": {"w": torch.full((100,), value)}, "progress": {"step": 3}, "classes": ["a", "b"], "none": None}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 7, state(2.5), top1=61.5)
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


@pytest.mark.parametrize("damage", [damage_flip, damage_cut, damage_manifest, damage_version])
def test_a_damaged_one_is_named_and_the_one_before_taken(tmp_path: Path, damage) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    checkpoint.save(tmp_path, 2, state(2))
    damage(tmp_path / "000000002")
    with pytest.warns(UserWarning, match=r"000000002.*falling back"):
        assert checkpoint.newest_whole(tmp_path).name == "000000001"
    damage(tmp_path / "000000001")
    with pytest.warns(UserWarning), pytest.raises(ConfigError, match=r"no checkpoint in .* is whole"):
        checkpoint.newest_whole(tmp_path)


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = tmp_path / "000000001"
    folder.mkdir()
    (folder / "state.pt").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ConfigError, match="cannot be read"):
        checkpoint.load(folder)
    assert not (tmp_path / "ran").exists()


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, top1 in [(1, 50.0), (2, 70.0), (3, 60.0), (4, None), (5, 65.0)]:
        checkpoint.save(tmp_path, step, state(), top1)
        checkpoint.prune(tmp_path, keep=2)
    assert [found.step for found in checkpoint.listing(tmp_path)] == [2, 4, 5]


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
    checkpoint.save(tmp_path, 4, state(1))
    checkpoint.save(tmp_path, 4, state(2), top1=9.0)
    checkpoint.prune(tmp_path, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["000000004"]
    assert checkpoint.load(tmp_path / "000000004")["model"]["w"][0] == 2
