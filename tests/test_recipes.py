"""Every recipe, as its file says, takes two steps on real ImageNet JPEGs; only the batch is made smaller."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from conftest import REPOSITORY, here, metrics, summary

from trainer import configfile

RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))
IMAGES = 12  # one a class: what trains is evaluated too, at the recipe's own size


@pytest.fixture(scope="module")
def few(imagenet_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("few")
    (root / "train").mkdir()
    for folder in sorted(path for path in imagenet_sample.iterdir() if path.is_dir())[:IMAGES]:
        (root / "train" / folder.name).symlink_to(folder)
    (root / "val").symlink_to(root / "train")
    return root


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_takes_two_steps(path: Path, few: Path, tmp_path: Path) -> None:
    recipe = configfile.load(path)
    batch = math.lcm(2, recipe.augment.repeats)  # the smallest that it divides and that mixup can pair
    options = [f"data.root={few}", f"output_dir={tmp_path / 'run'}", f"global_batch_size={batch}", "report.log_every=1"]
    options += ["report.wandb=disabled", "loop.max_steps=2"]
    if recipe.ema.half_life is not None:  # counted in samples, and here are few
        options += ["ema.half_life=4", "ema.every=1", "ema.start_epoch=0"]
    done = here("train", path, *options)
    assert done.status == 0, done.errors
    assert [math.isfinite(record["loss"]) for record in metrics(tmp_path / "run", "train")] == [True, True]
    (evaluated,) = metrics(tmp_path / "run", "eval")
    assert evaluated["count"] == IMAGES and ("ema_top1" in evaluated) == (recipe.ema.half_life is not None)
    assert summary(tmp_path / "run").get("target") == (recipe.loop.stop_at or None)
