"""A small run with averaged weights, for the tests of what is done with one."""

from __future__ import annotations

from pathlib import Path

from conftest import here

SMALL = ["data.image_size=32", "global_batch_size=24", "schedule.epochs=3", "schedule.warmup_epochs=1"]
SMALL += ["model.name=resnet20", "report.wandb=disabled", "precision.amp=fp32", "ema.half_life=30"]


def train(folder: Path, data: Path, *options: str) -> Path:
    """Train on `data` into `folder`/run, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.yaml").write_text("{}")
    done = here("train", folder / "small.yaml", *SMALL, f"data.root={data}", f"output_dir={folder / 'run'}", *options)
    assert done.status == 0, done.errors
    return folder / "run"
