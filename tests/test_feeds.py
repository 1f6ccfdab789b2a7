"""What changes from epoch to epoch: image size and strength, functions of the step."""

from __future__ import annotations

import pytest
from conftest import REPOSITORY

from trainer import configfile
from trainer.data import policies
from trainer.data.feeds import image_size, strengthened
from trainer.plan import Plan


@pytest.mark.parametrize(("epochs", "switch"), [(16, 12), (24, 19), (32, 25), (40, 32), (56, 45), (88, 71)])
def test_one_ramp_is_ffcvs_at_every_length(epochs: int, switch: int) -> None:
    # The epochs of its six files' start_ramp and end_ramp, rounded to 32 px as its get_resolution does.
    config = configfile.load(REPOSITORY / "configs" / "ffcv_rn50.yaml", [f"schedule.scale={epochs / 16}"])
    plan = Plan.of(config, 8, 1_281_167)
    sizes = [image_size(config.data, plan, -(-epoch * plan.samples // plan.global_batch)) for epoch in range(epochs)]
    assert sizes == [160] * switch + [192] * (epochs - switch)


def test_augmentation_grows_stronger_with_the_image_and_the_graph_stays() -> None:
    options = ["augment.policy=randaugment", "augment.start_strength=0.25", "augment.brightness=0.4"]
    options += ["data.ramp=[0,0.5]", "schedule.epochs=8", "schedule.warmup_epochs=0", "global_batch_size=24"]
    config = configfile.load(None, options)
    plan = Plan.of(config, 1, 48)
    drawn = [strengthened(config.augment, config.data, plan, step) for step in (0, 3, 8, 15)]
    assert [a.magnitude / 9 for a in drawn] == pytest.approx([0.4375, 0.625, 1, 1])
    assert [a.brightness / 0.4 for a in drawn] == pytest.approx([0.4375, 0.625, 1, 1])
    assert {policies.layers(a) for a in drawn} == {policies.layers(config.augment)}
