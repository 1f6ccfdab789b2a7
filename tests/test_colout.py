"""ColOut: Composer's arithmetic, drawn by step, so that ranks and accumulation have no say."""

from __future__ import annotations

import pytest
import torch
from nets import ALONE

from trainer import configfile
from trainer.colout import colout
from trainer.config import Augment, ConfigError
from trainer.learner import _mixing
from trainer.plan import Plan


def numbered(height: int = 40, width: int = 30, n: int = 4) -> torch.Tensor:
    """Images whose pixels say where they were: row in channel 0, column in channel 1, sample in channel 2."""
    images = torch.zeros(n, 3, height, width)
    images[:, 0] = torch.arange(height)[:, None].float()
    images[:, 1] = torch.arange(width).float()
    images[:, 2] = torch.arange(n).float()[:, None, None]
    return images


@pytest.mark.parametrize("share", [0.05, 0.15, 0.5])
def test_what_stays_is_whole_rows_and_columns_in_order_the_same_for_every_image(share: float) -> None:
    images = numbered()
    kept = colout(images, share, 0, 7)
    # Composer's sizes: int((1 - p) * size).
    assert kept.shape == (4, 3, int((1 - share) * 40), int((1 - share) * 30))
    rows, columns = kept[0, 0, :, 0], kept[0, 1, 0]
    assert (rows.diff() > 0).all() and (columns.diff() > 0).all()
    assert torch.equal(kept, images[:, :, rows.long()][:, :, :, columns.long()])


def test_every_row_has_the_same_chance() -> None:
    images = numbered(20, 20, 1)
    counts = torch.zeros(20)
    for step in range(2000):
        counts[colout(images, 0.25, 0, step)[0, 0, :, 0].long()] += 1
    assert ((counts / 2000 - 0.75).abs() < 0.05).all()


def test_a_draw_belongs_to_seed_and_step_and_the_layout_is_kept() -> None:
    images = numbered().contiguous(memory_format=torch.channels_last)
    before = images.clone()
    one = colout(images, 0.15, 3, 5)
    assert one.is_contiguous(memory_format=torch.channels_last) and torch.equal(images, before)
    assert colout(images.contiguous(), 0.15, 3, 5).is_contiguous()
    assert torch.equal(torch.cat([colout(images[:2], 0.15, 3, 5), colout(images[2:], 0.15, 3, 5)]), one)
    assert not torch.equal(colout(images, 0.15, 3, 6), one) and not torch.equal(colout(images, 0.15, 4, 5), one)
    assert one[0, 0, :, 0].tolist() != one[0, 1, 0].tolist(), "rows and columns are drawn apart"


@pytest.mark.parametrize("mixing", [[], ["mix.mixup=0.2"]])
def test_a_step_uses_it_with_and_without_mixing(mixing: list[str]) -> None:
    config = configfile.load(None, ["global_batch_size=4", "augment.colout=0.1", "schedule.warmup_epochs=0", *mixing])
    labels = torch.tensor([0, 1, 2, 3])
    images, targets = _mixing(config, Plan.of(config, 1, 80), ALONE, 10)(numbered(), labels, 2, 0)
    assert images.shape[2:] == (36, 27) and targets.shape == ((4, 10) if mixing else (4,))


@pytest.mark.parametrize("wrong", [-0.1, 0.6, 1.0])
def test_an_impossible_share_names_its_key(wrong: float) -> None:
    with pytest.raises(ConfigError, match=r"augment\.colout="):
        Augment(colout=wrong)
