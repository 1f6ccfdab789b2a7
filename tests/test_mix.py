"""Mixup and CutMix: torchvision's arithmetic, drawn by position, so that ranks and batches have no say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import ALONE
from torchvision.transforms import v2

from trainer import configfile
from trainer.config import ConfigError, Mix
from trainer.data.philox import AUGMENT, AUGMENT_OPS, COLOUT, MIX, ORDER
from trainer.learner import _mixing
from trainer.mix import _beta, mix, strengths
from trainer.plan import Plan

BOTH = Mix(mixup=0.2, cutmix=1.0)


def batch(n: int = 16, size: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(10, (n,), generator=generator)


def draws(options: Mix, n: int, step: int = 0, seed: int = 0):
    return strengths(options, seed, step, np.arange(n), (224, 200))


@pytest.mark.parametrize("options", [Mix(mixup=0.4), Mix(cutmix=1.0), BOTH, Mix(mixup=1.0, chance=0.5)])
def test_arithmetic_is_torchvisions_at_the_same_strength_and_box(options: Mix) -> None:
    images, labels = batch(64)
    mixed, targets = mix(images, labels, options, 10, 7, 3, 0)
    drawn = strengths(options, 7, 3, np.arange(64), (24, 24))
    for i in range(0, 64, 2):
        pair = images[i : i + 2].contiguous(), labels[i : i + 2]
        if drawn.inside[i] == 0:
            transform, box = v2.CutMix(num_classes=10), drawn.box[i].tolist()
            params = {"box": box, "lam_adjusted": float(drawn.share[i])}
            assert drawn.share[i] == np.float32(1 - (box[2] - box[0]) * (box[3] - box[1]) / 24**2)
        else:
            transform, params = v2.MixUp(num_classes=10), {"lam": float(drawn.share[i])}
        # torchvision rolls the batch by one: within a batch of two that is our swap.
        params |= {"labels": pair[1], "batch_size": 2}
        assert torch.allclose(mixed[i : i + 2], transform.transform(pair[0], params), atol=1e-6)
        assert torch.allclose(targets[i : i + 2], transform.transform(pair[1], params), atol=1e-6)


@pytest.mark.parametrize("group", [0, 2, 8])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_and_accumulation_change_nothing(group: int, ranks: int) -> None:
    images, labels = batch(32)
    options = Mix(mixup=0.2, cutmix=1.0, group=group)
    whole = mix(images, labels, options, 10, 0, 5, 0)
    share = 32 // ranks
    parts = [mix(images[i : i + share], labels[i : i + share], options, 10, 0, 5, i) for i in range(0, 32, share)]
    for one, many in zip(whole, zip(*parts)):
        assert (one == torch.cat(many)).all()


def test_draws_depend_on_seed_step_and_group_alone() -> None:
    one = draws(BOTH, 512)
    assert (one.share[::2] == one.share[1::2]).all(), "a pair shares its draw"
    assert len(np.unique(one.share)) > 150
    again = strengths(BOTH, 0, 0, np.array([300]), (224, 200))
    assert again.share == one.share[300] and (again.box == one.box[300]).all()
    assert (draws(BOTH, 512, step=1).share != one.share).mean() > 0.9
    assert (draws(BOTH, 512, seed=1).share != one.share).mean() > 0.9
    assert len(np.unique(draws(Mix(mixup=1.0, group=0), 512).share)) == 1
    assert len(np.unique(draws(Mix(mixup=1.0, group=64), 512).share)) == 8


def test_an_odd_batch_is_refused_and_the_input_is_left_alone() -> None:
    images, labels = batch(6)
    before = images.clone()
    mixed, _ = mix(images, labels, BOTH, 10, 0, 0, 2)
    assert (images == before).all() and mixed.is_contiguous(memory_format=torch.channels_last)
    assert mix(images.contiguous(), labels, BOTH, 10, 0, 0, 2)[0].is_contiguous()
    for count, first in ((5, 0), (6, 1)):
        with pytest.raises(AssertionError, match="cut a pair"):
            mix(images[:count], labels[:count], BOTH, 10, 0, 0, first)


def test_half_precision_keeps_its_type_and_targets_stay_float32() -> None:
    images, labels = batch()
    mixed, targets = mix(images.to(torch.bfloat16), labels, BOTH, 10, 0, 0, 0)
    assert mixed.dtype == torch.bfloat16 and targets.dtype == torch.float32
    assert torch.allclose(targets.sum(1), torch.ones(16))


def test_cross_entropy_takes_the_targets() -> None:
    images, labels = batch()
    _, targets = mix(images, labels, BOTH, 10, 0, 0, 0)
    logits = torch.randn(16, 10, generator=torch.Generator().manual_seed(1))
    share = torch.from_numpy(strengths(BOTH, 0, 0, np.arange(16), (24, 24)).share)
    partners = labels.unflatten(0, (-1, 2)).flip(1).flatten()
    each = torch.nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
    by_hand = (share * each(logits, labels) + (1 - share) * each(logits, partners)).mean()
    assert torch.allclose(torch.nn.CrossEntropyLoss(label_smoothing=0.1)(logits, targets), by_hand)


def test_shares_are_distributed_as_beta() -> None:
    u = (np.arange(20_000) + 0.5) / 20_000
    # Where the distribution function is known in closed form, inversion must undo it.
    assert abs(_beta(1.0, u) - u).max() < 1e-6
    assert abs(_beta(0.5, u) - np.sin(np.pi * u / 2) ** 2).max() < 1e-6
    x = _beta(2.0, u)
    assert abs(3 * x**2 - 2 * x**3 - u).max() < 1e-6
    for alpha in (0.1, 0.2, 0.8, 10.0):
        x = _beta(alpha, u)
        assert (np.diff(x) >= 0).all() and abs(x.mean() - 0.5) < 1e-6
        assert abs(x.var() - 1 / (4 * (2 * alpha + 1))) < 1e-4, "the variance of Beta(alpha, alpha)"


def test_rates_and_boxes() -> None:
    drawn = draws(Mix(mixup=0.2, cutmix=1.0, cutmix_share=0.25, chance=0.8), 20_000)
    whole = drawn.share == 1
    cut = ~whole & (drawn.inside == 0)
    assert abs(whole.mean() - 0.2) < 0.02
    assert abs(cut.sum() / (~whole).sum() - 0.25) < 0.02
    x1, y1, x2, y2 = draws(Mix(cutmix=1.0), 20_000).box.T
    assert x1.min() == 0 and y1.min() == 0 and x2.max() == 200 and y2.max() == 224
    assert (x2 >= x1).all() and (y2 >= y1).all()
    mixup = draws(Mix(mixup=0.2), 100)
    assert (mixup.outside == mixup.inside).all() and (mixup.share == mixup.inside).all()
    assert not Mix().on and not Mix(mixup=1.0, chance=0).on and BOTH.on


def test_no_number_is_shared_with_the_crop_windows() -> None:
    assert len({ORDER, AUGMENT, AUGMENT_OPS, MIX, COLOUT}) == 5


@pytest.mark.parametrize("wrong", [{"mixup": -1}, {"cutmix": 11}, {"cutmix_share": 2}, {"chance": -0.1}, {"group": 3}])
def test_impossible_options_name_their_key(wrong: dict) -> None:
    (key,) = wrong
    with pytest.raises(ConfigError, match=f"mix.{key}="):
        Mix(**wrong)


def test_mixing_is_switched_off_at_its_epoch_stretched_with_the_schedule() -> None:
    options = ["mix.mixup=1", "mix.off_epoch=2", "schedule.epochs=4", "schedule.scale=2", "schedule.warmup_epochs=0"]
    config = configfile.load(None, ["global_batch_size=16", *options])
    plan = Plan.of(config, 1, 80)  # 5 steps an epoch, 40 in all, the last 20 of them plain
    mixing = _mixing(config, plan, ALONE, 10)
    given = batch()
    for step in range(40):
        images, targets = mixing(*given, step, 0)
        assert (targets.ndim == 1) == (images is given[0]) == (step >= 20)
