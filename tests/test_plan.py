"""The arithmetic of a run."""

from __future__ import annotations

import pytest

from trainer import configfile
from trainer.config import ConfigError
from trainer.plan import Plan


def plan(ranks: int, samples: int, *overrides: str) -> Plan:
    return Plan.of(configfile.load(None, overrides), ranks, samples)


def test_imagenet_on_eight_gpus() -> None:
    found = plan(8, 1_281_167, "global_batch_size=2048", "max_batch_per_gpu=128", "schedule.warmup_epochs=8")
    assert (found.batch, found.accumulation) == (128, 2)
    assert found.total_steps == -(-90 * 1_281_167 // 2048) == 56302
    assert found.warmup_steps == round(8 * 1_281_167 / 2048)
    assert "global batch 2048 = 8 ranks x 128 images x 2 accumulated" in str(found)
    assert "1281167 images = 625.57 steps an epoch; 56302 steps" in str(found)


@pytest.mark.parametrize("limit", range(1, 70))
def test_accumulation_is_the_smallest_that_fits(limit: int) -> None:
    found = plan(2, 1000, "global_batch_size=96", f"max_batch_per_gpu={limit}")
    assert found.batch * found.accumulation * 2 == 96
    assert found.batch <= limit
    assert not [a for a in range(1, found.accumulation) if 48 % a == 0 and 48 // a <= limit]


@pytest.mark.parametrize(("samples", "batch"), [(48, 16), (50, 16), (7, 7), (100, 3), (1000, 999)])
def test_epochs_tile_the_steps(samples: int, batch: int) -> None:
    found = plan(1, samples, f"global_batch_size={batch}", "schedule.epochs=7", "schedule.warmup_epochs=1")
    step, epoch = 0, 0
    while epoch < 7:
        end = found.epoch_end(step)
        assert end > step and {found.epoch_of(s) for s in range(step, end)} == {epoch}
        # All of the epoch's positions are taken by its end, and not a whole batch more.
        assert (epoch + 1) * samples <= end * batch < (epoch + 1) * samples + batch
        step, epoch = end, epoch + 1
    assert step == found.total_steps


def test_impossible_batches_are_refused_with_the_nearest_possible() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size=100 does not divide among 3 ranks: use 99 or 102"):
        plan(3, 1000, "global_batch_size=100")
    with pytest.raises(ConfigError, match=r"global_batch_size=2 does not divide among 3 ranks: use 3$"):
        plan(3, 1000, "global_batch_size=2")
    with pytest.raises(ConfigError, match=r"global_batch_size=256 is more than the 48 training images: use 48 or less"):
        plan(1, 48)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.warmup_steps=70", r"schedule\.warmup_steps=70 leaves nothing of schedule\.epochs=7, which are 70"),
        ("schedule.warmup_samples=8000", r"schedule\.warmup_samples=8000 leaves nothing of schedule\.epochs=7"),
        ("ema.half_life=7001", r"ema\.half_life=7001 is longer than the run of schedule\.epochs=7, which sees 7000"),
    ],
)
def test_what_outlasts_the_run_is_refused_naming_both_keys(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(1, 1000, "global_batch_size=100", "schedule.epochs=7", override)
