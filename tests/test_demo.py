"""`make demo`, shortened: the drawn set, two gloo ranks, every real part."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import REPOSITORY, here, summary, torchrun

from trainer.data.prepare.demo import make_demo


@pytest.mark.end_to_end
def test_two_ranks_learn_the_drawn_set_and_say_what_came_of_it(tmp_path: Path) -> None:
    make_demo(tmp_path / "data", classes=4, train_per_class=120, val_per_class=15, workers=2)
    options = [f"data.root={tmp_path / 'data'}", f"output_dir={tmp_path / 'run'}", "schedule.epochs=20"]
    done = torchrun("train", REPOSITORY / "configs" / "demo.yaml", *options, ranks=2)
    assert done.status == 0, done.errors
    found = summary(tmp_path / "run")
    assert found["status"] == "done" and found["last_top1"] > 60, "chance is 25%"
    *lines, top1, speed, place = done.output.splitlines()
    assert top1.startswith(f"top-1     {found['last_top1']:.2f}%")
    assert speed.startswith(f"speed     {found['images_per_second']:,.0f} images/s")
    assert place == f"done      {tmp_path / 'run'}"
    assert any("step 150/300" in line for line in lines), "progress is shown"
    assert "global batch 32 = 2 ranks x 16 images x 1 accumulated" in done.output


def test_prepare_makes_the_set_once_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.__main__.DEMO", {"classes": 3, "train_per_class": 2, "val_per_class": 1, "workers": 1})
    made, again = (here("prepare", "demo", tmp_path / "set") for _ in range(2))
    assert made.status == again.status == 0
    assert made.output == f"{tmp_path / 'set'} is drawn\n" and "is there already" in again.output
    assert len(list((tmp_path / "set").rglob("*.JPEG"))) == 9
    refused = here("prepare", "demo", tmp_path / "other", "--quality", "50")
    assert refused.status == 2 and "takes no options but --workers" in refused.errors


def test_prepare_and_inspect_are_commands(tiny: Path, tmp_path: Path) -> None:
    done = here("prepare", tiny, tmp_path / "shards", "--format", "shards", "--workers", "1")
    assert done.status == 0, done.errors
    assert here("inspect", tmp_path / "shards", "--workers", "1").status == 0
    options = [f"data.root={tmp_path / 'shards'}", f"output_dir={tmp_path / 'run'}", "data.image_size=32"]
    trained = here("train", REPOSITORY / "configs" / "demo.yaml", *options, "schedule.epochs=2")
    assert trained.status == 0 and "4 classes" in trained.output, trained.errors
    for split in ("train", "val"):
        (tmp_path / "bad" / split / "a").mkdir(parents=True)
        (tmp_path / "bad" / split / "a" / "0.JPEG").write_text("no image")
    inspected = here("inspect", tmp_path / "bad", "--workers", "1")
    assert inspected.status == 1 and "0.JPEG" in inspected.output + inspected.errors
    refused = here("prepare", tmp_path / "run", tmp_path / "x")
    assert refused.status == 2 and refused.errors.count("\n") == 1
