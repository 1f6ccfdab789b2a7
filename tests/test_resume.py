"""Stopped after any step and run again is, to the last bit, the run that was never stopped (CPU, fixed threads)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import here, metrics
from test_faults import SMALL

from trainer import checkpoint

TIMINGS = ("wall_seconds", "seconds", "images_per_second", "data_wait_fraction", "step_seconds")
TIMINGS += ("images_per_second_per_gpu", "allreduce_fraction", "rank_wait_fraction")
TIMINGS += ("slowest_rank", "slowest_rank_excess", "slowest_rank_by")
# Two forward batches a step, each draw there is, BatchNorm and dropout: whatever could depend on more than the step.
EVERYTHING = ["max_batch_per_gpu=4", "model.drop_path_rate=0.2", "mix.mixup=0.2", "mix.cutmix=1.0", "augment.erase=0.3"]
EVERYTHING += ["augment.policy=randaugment", "loss.label_smoothing=0.1", "optim.clip_norm=1.0"]


def train(folder: Path, data: Path, name: str, *overrides: str) -> Path:
    (folder / "empty.yaml").write_text("{}")
    run = folder / name
    done = here("train", folder / "empty.yaml", f"data.root={data}", f"output_dir={run}", *SMALL, *overrides)
    assert done.status == 0, done.errors
    return run


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("whole"), tiny, "run", *EVERYTHING)


def records(run: Path, after: int) -> list[dict]:
    found = [record for kind in ("train", "eval") for record in metrics(run, kind) if record["step"] > after]
    return [{key: value for key, value in record.items() if key not in TIMINGS} for record in found]


# The first step, in mid-epoch, where an epoch ends, after it.
@pytest.mark.parametrize("step", [1, 3, 6, 8])
def test_resume_is_equality(tiny: Path, tmp_path: Path, whole: Path, step: int) -> None:
    train(tmp_path, tiny, "run", *EVERYTHING, f"loop.max_steps={step}")
    run = train(tmp_path, tiny, "run", *EVERYTHING)
    assert records(run, step) == records(whole, step) and len(records(run, step)) >= 12 - step
    ours, theirs = (checkpoint.load(checkpoint.newest_whole(path / "checkpoints")) for path in (run, whole))
    for part in ("model", "optimizer", "scaler", "ranks"):
        equal(ours[part], theirs[part], part)


def equal(ours: object, theirs: object, where: str) -> None:
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            equal(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for number, (mine, other) in enumerate(zip(ours, theirs)):
            equal(mine, other, f"{where}.{number}")
    else:
        assert ours == theirs, where
