"""Tables of (step, learning rate)."""

from __future__ import annotations

import math

import pytest

from trainer import configfile
from trainer.plan import Plan
from trainer.schedule import lr_at


def lrs(*overrides: str, samples: int = 1000) -> list[float]:
    """The learning rate of every step at 10 steps an epoch and a peak of 2."""
    config = configfile.load(None, ["global_batch_size=100", "optim.lr=2", *overrides])
    plan = Plan.of(config, 1, samples)
    return [lr_at(step, config.schedule, plan) for step in range(plan.total_steps)]


def test_warm_up_then_cosine() -> None:
    table = lrs("schedule.epochs=12", "schedule.warmup_epochs=2")
    assert len(table) == 120
    assert table[0] == 0 and table[1] == pytest.approx(0.1) and table[10] == pytest.approx(1.0)
    assert table[20] == 2 == max(table)
    assert table[70] == pytest.approx(1.0)  # half way down the cosine
    assert table[119] == pytest.approx(1 + math.cos(math.pi * 99 / 100)) and table[119] < 0.001


def test_warm_up_may_begin_above_zero() -> None:
    table = lrs("schedule.epochs=12", "schedule.warmup_epochs=2", "schedule.warmup_start=0.5")
    assert table[0] == 1 and table[10] == pytest.approx(1.5) and table[20] == 2


def test_no_warm_up_begins_at_the_peak() -> None:
    assert lrs("schedule.epochs=5", "schedule.warmup_epochs=0")[0] == 2


def test_final_share_is_where_cosine_and_linear_end() -> None:
    for name in ("cosine", "linear"):
        table = lrs(f"schedule.name={name}", "schedule.epochs=10", "schedule.warmup_epochs=0", "schedule.final=0.1")
        assert table == sorted(table, reverse=True) and 0.2 < table[-1] < 0.22


def test_linear_falls_evenly() -> None:
    table = lrs("schedule.name=linear", "schedule.epochs=12", "schedule.warmup_epochs=2")
    assert [table[s] for s in (20, 45, 70, 95)] == pytest.approx([2, 1.5, 1, 0.5])


def test_steps_fall_at_epochs_whatever_the_batch() -> None:
    options = ("schedule.name=step", "schedule.epochs=9", "schedule.warmup_epochs=0", "schedule.step_epochs=[3,6,8]")
    table = lrs(*options)
    assert [table[s] for s in (29, 30, 59, 60, 79, 80, 89)] == pytest.approx([2, 0.2, 0.2, 0.02, 0.02, 0.002, 0.002])
    table = lrs(*options, samples=955)  # 9.55 steps an epoch: epoch 3 begins within step 28
    assert table[28] == 2 and table[29] == pytest.approx(0.2)


def test_constant_stays() -> None:
    assert set(lrs("schedule.name=constant", "schedule.epochs=3", "schedule.warmup_epochs=0")) == {2.0}


def test_polynomial_is_its_power() -> None:
    table = lrs("schedule.name=polynomial", "schedule.epochs=10", "schedule.warmup_epochs=0", "schedule.final=0.25")
    assert [table[s] for s in (0, 50, 90)] == pytest.approx([2, 0.5 + 1.5 / 4, 0.5 + 1.5 / 100])
    table = lrs("schedule.name=polynomial", "schedule.epochs=10", "schedule.warmup_epochs=0", "schedule.power=1")
    assert table == pytest.approx(lrs("schedule.name=linear", "schedule.epochs=10", "schedule.warmup_epochs=0"))


def test_a_step_falls_by_its_factor() -> None:
    table = lrs("schedule.name=step", "schedule.epochs=6", "schedule.warmup_epochs=0", "schedule.step_factor=0.5",
                "schedule.step_epochs=[2,4]")  # fmt: skip
    assert [table[s] for s in (19, 20, 40)] == pytest.approx([2, 1, 0.5])


def test_warm_up_is_as_long_in_steps_and_in_samples_as_in_epochs() -> None:
    by_epochs = lrs("schedule.epochs=12", "schedule.warmup_epochs=2")
    assert lrs("schedule.epochs=12", "schedule.warmup_steps=20") == by_epochs
    assert lrs("schedule.epochs=12", "schedule.warmup_samples=2000") == by_epochs


def test_scale_stretches_everything_but_the_warm_up() -> None:
    options = ("schedule.name=step", "schedule.step_epochs=[3,6]", "schedule.warmup_epochs=1")
    short, long = lrs(*options, "schedule.epochs=8"), lrs(*options, "schedule.epochs=8", "schedule.scale=2")
    assert len(long) == 160 and short[:10] == long[:10]
    assert [s for s in range(1, 160) if long[s] < long[s - 1]] == [60, 120]
    assert long == lrs("schedule.name=step", "schedule.step_epochs=[6,12]", "schedule.epochs=16",
                       "schedule.warmup_epochs=1")  # fmt: skip


@pytest.mark.parametrize(("how", "factor"), [("none", 1), ("linear", 8), ("sqrt", math.sqrt(8))])
def test_the_rate_is_scaled_on_request_alone(how: str, factor: float) -> None:
    config = configfile.load(None, ["global_batch_size=2048", "optim.lr=0.1", f"optim.scale_lr={how}"])
    plan = Plan.of(config, 8, 1_281_167)
    assert plan.peak_lr == pytest.approx(0.1 * factor) == lr_at(plan.warmup_steps, config.schedule, plan)
