"""Trajectory parity: 20 steps of a recipe by this trainer are those of plain PyTorch (tests/parity.py).

On a CPU: the recipe's own file with a small ResNet of the same family, small images, a small batch, the rate scaled to
it, and a length that puts warm-up and decay within 20 steps. The 20 steps are in float64: in float32 rounding alone
turns ReLUs over, and plain PyTorch with its images moved by 5e-7 is 9% from its own losses within 20 steps (V2 at
64 px; LARS 80%): any tolerance that passes would pass a wrong recipe. In float64, moved by 1e-15, it stays within
2e-14. In float32 the first steps are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
import parity
import pytest
import torch
from conftest import REPOSITORY
from nets import ALONE
from torchvision import models
from torchvision.transforms import v2

from trainer import configfile, learner
from trainer.config import Config
from trainer.data.loader import Batch, DataSet
from trainer.loop import Learner, train_steps
from trainer.mix import strengths
from trainer.models import build
from trainer.plan import Plan

BATCH, STEPS, CLASSES, SIDE, EPOCHS = 8, 20, 10, 32, 4
FLOAT32_STEPS = 2
SAMPLES = BATCH * STEPS // EPOCHS


def configure(recipe: str, lr: float, *overrides: str) -> Config:
    options = ["model.name=resnet18", "precision.amp=fp32", "precision.channels_last=false", f"optim.lr={lr}"]
    options += [f"global_batch_size={BATCH}", f"schedule.epochs={EPOCHS}", "loop.eval_every=0", *overrides]
    return configfile.load(REPOSITORY / "configs" / f"{recipe}.yaml", options)


def batches(config: Config) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images whose class can be seen, so that there is something to learn."""
    generator = torch.Generator().manual_seed(3)
    tints = torch.randn(CLASSES, 3, 4, 4, generator=generator)
    for _ in range(STEPS):
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        images = torch.nn.functional.interpolate(tints[labels], SIDE, mode="bilinear")
        yield images + torch.randn(BATCH, 3, SIDE, SIDE, generator=generator), labels


def mixed(config: Config, given: Iterator[Batch]) -> Iterator[Batch]:
    """The batches given, mixed by torchvision's transforms with the strengths that this trainer draws."""
    for step, (images, labels) in enumerate(given):
        drawn = strengths(config.mix, config.seed, step, np.arange(BATCH), (SIDE, SIDE))
        done = []
        for i in range(0, BATCH, 2):
            if drawn.inside[i] == 0:
                transform = v2.CutMix(num_classes=CLASSES)
                params = {"box": drawn.box[i].tolist(), "lam_adjusted": float(drawn.share[i])}
            else:
                transform, params = v2.MixUp(num_classes=CLASSES), {"lam": float(drawn.share[i])}
            pair = images[i : i + 2], labels[i : i + 2]
            params |= {"labels": pair[1], "batch_size": 2}
            done.append([transform.transform(part, params) for part in pair])
        yield tuple(torch.cat(parts) for parts in zip(*done))


V2 = partial(parity.torchvision_v2, decay=0.5 ** (2 * BATCH / 40), every=2)
MOSAIC = partial(parity.mosaic_mild, half_life=40 / BATCH, every=2)
EMA = ("ema.half_life=40", "ema.every=2")
REDUCED = ("schedule.warmup_epochs=1",)
# Recipe, its peak at this batch, what else is made smaller, the reference.
FAMILIES: dict[str, tuple[float, tuple[str, ...], Callable]] = {
    "torchvision_v1": (0.1 / 32, ("schedule.step_epochs=[1.3333,2.6667]",), parity.torchvision_v1),
    "torchvision_v2": (0.5 / 128, (*REDUCED, *EMA, "ema.start_epoch=1", "augment.repeats=1"), V2),
    "resnet50_90ep": (2.048 / 256, REDUCED, parity.nvidia_90),
    "ffcv_rn50": (1.7 / 512, REDUCED, parity.ffcv),
    "rsb_a3": (8e-3 / 16, REDUCED, parity.a3),
    "mosaic_mild": (2.048 / 256, (*REDUCED, *EMA, f"optim.weight_decay={5e-4 / (2.048 / 256)}"), MOSAIC),
    "mlperf_lars_2048": (8.5, (*REDUCED, "loop.eval_every=1"), parity.mlperf_lars),
}


def apart(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest relative distance of two lists of tensors; counters of batches, which torch averages, aside."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.is_floating_point()]
    return max(float((a - b).double().norm() / b.double().norm().clamp(min=1e-3)) for a, b in pairs)


@pytest.mark.parametrize("recipe", FAMILIES)
def test_twenty_steps_are_those_of_plain_pytorch(recipe: str) -> None:
    lr, overrides, reference = FAMILIES[recipe]
    config = configure(recipe, lr, *overrides)
    plan = Plan.of(config, 1, SAMPLES)
    assert plan.total_steps == STEPS
    length = parity.Length(STEPS, plan.warmup_steps, lr, STEPS / EPOCHS)

    def given(steps: int, *, double: bool) -> Iterator[Batch]:
        source = map(as_double, batches(config)) if double else batches(config)
        return islice(mixed(config, source) if config.mix.on else source, steps)

    ours, net = twins(config, plan)
    theirs = reference(net, given(FLOAT32_STEPS, double=False), length)
    assert losses_of(ours, islice(batches(config), FLOAT32_STEPS)) == pytest.approx(theirs.losses, rel=1e-4)

    ours, net = twins(config, plan, torch.float64)
    start = [p.detach().clone() for p in net.parameters()]
    theirs = reference(net, map(as_double, given(STEPS, double=True)), length)
    losses = losses_of(ours, map(as_double, batches(config)))
    assert losses == pytest.approx(theirs.losses, rel=1e-6)
    weights, final = ([p.detach() for p in model.parameters()] for model in (ours.model, net))
    assert apart(weights, final) < 1e-6
    assert apart(weights, start) > 1e-2, "the weights have moved"
    if theirs.average is not None:
        average = list(ours.average.model.state_dict().values())
        assert apart(average, theirs.average) < 1e-6
        assert apart(average, list(ours.model.state_dict().values())) > 1e-3, "an average is not a copy"


def twins(config: Config, plan: Plan, dtype: torch.dtype = torch.float32) -> tuple[Learner, torch.nn.Module]:
    """Our learner, and torchvision's network with its initial weights."""
    data = DataSet(None, None, SAMPLES, tuple(map(str, range(CLASSES))), "")
    ours = learner.create(config, plan, ALONE, data)
    net = models.resnet18(num_classes=CLASSES)
    net.load_state_dict(build.unwrap(ours.model).state_dict())
    for model in (ours.model, net, *([ours.average.model] if ours.average else [])):
        model.to(dtype)
    mix = ours.mix
    if mix is not None:  # its targets are float32 whatever the images are
        ours = replace(ours, mix=lambda *batch: as_double(mix(*batch)) if dtype is torch.float64 else mix(*batch))
    return ours, net


def losses_of(ours: Learner, source: Iterator[Batch]) -> list[float]:
    given = list(source)
    return [float(record.totals[0]) / BATCH for record in train_steps(ours, iter(given), range(len(given)))]


def as_double(batch: Batch) -> Batch:
    images, targets = batch
    return images.double(), targets.double() if targets.is_floating_point() else targets
