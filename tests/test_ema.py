"""The average of the weights: its memory in samples, its warm-up, its buffers."""

from __future__ import annotations

import pytest
import torch
from nets import ours

from trainer import configfile
from trainer.config import Ema
from trainer.ema import Average, decay_at
from trainer.plan import Plan


def plan(batch: int = 100, samples: int = 1000) -> Plan:
    return Plan.of(configfile.load(None, [f"global_batch_size={batch}", "schedule.epochs=10"]), 1, samples)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("batch", [10, 100, 500])
def test_a_weight_counts_half_after_half_life_samples_at_any_batch(batch: int, every: int) -> None:
    options, found, kept = Ema(half_life=4000, every=every), plan(batch), 1.0
    for step in range(8000 // batch):
        kept *= 1.0 if (decay := decay_at(step, options, found)) is None else decay
    assert kept == pytest.approx(0.25)


def test_it_is_a_copy_until_its_start_and_young_while_the_run_is() -> None:
    options = Ema(half_life=4000, start_epoch=2, rampup=0.5)
    found = plan()
    assert [decay_at(step, options, found) for step in (0, 19)] == [0, 0]
    # 100 samples after the start, half of which is the half-life; and 4000 once 8000 are seen since.
    assert decay_at(20, options, found) == pytest.approx(0.5 ** (100 / 50))
    assert decay_at(99, options, found) == pytest.approx(0.5 ** (100 / 4000))


def test_torchvisions_reference_is_a_half_life() -> None:
    # Its alpha: (1 - 0.99998) * 1024 * 32 / 600 every 32 steps, with 600 epochs (references/classification/train.py).
    alpha = (1 - 0.99998) * 1024 * 32 / 600
    found = decay_at(31, Ema(half_life=2.078e7, every=32), plan(1024, 1_281_167))
    assert found == pytest.approx(1 - alpha, abs=1e-6)


def test_parameters_and_statistics_are_averaged_and_counters_kept() -> None:
    model, theirs = ours("resnet20"), ours("resnet20")
    average = Average(model, Ema(half_life=200), plan())
    torch_average = torch.optim.swa_utils.AveragedModel(
        theirs, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5**0.5), use_buffers=True
    )
    torch_average.update_parameters(theirs)  # torch's first update is a copy, ours is made at the start
    for step in range(3):
        for net in (model, theirs):
            torch.manual_seed(step)
            for tensor in (*net.parameters(), *net.buffers()):
                tensor.data.add_(torch.randn(tensor.shape) if tensor.is_floating_point() else 1)
        average.update(step)
        torch_average.update_parameters(theirs)
    for (name, mine), other in zip(average.model.state_dict().items(), torch_average.module.state_dict().values()):
        if mine.is_floating_point():
            torch.testing.assert_close(mine, other, msg=name)
        else:
            assert mine == 3
    assert not any(p.requires_grad for p in average.model.parameters())
