"""Crop windows: torchvision's distribution for training, torchvision's pixels for evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from trainer.config import Augment
from trainer.data.augment import evaluation_windows, training_windows


def windows(options: Augment, size: int, width: int, height: int, count: int = 4000):
    keys = (np.zeros(count, int), np.arange(count), np.zeros(count, int))
    return training_windows(options, size, 0, keys, (np.full(count, width), np.full(count, height)))


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (224, 224), (30, 2000), (2000, 30), (1, 1)])
def test_resized_windows_lie_inside_and_are_distributed_as_torchvisions(width: int, height: int) -> None:
    found = windows(Augment(), 224, width, height)
    assert (found.x >= 0).all() and (found.y >= 0).all() and (found.width > 0).all() and (found.height > 0).all()
    assert (found.x + found.width <= width).all() and (found.y + found.height <= height).all()

    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    crop = v2.RandomResizedCrop(224)
    params = [crop.make_params([image]) for _ in range(4000)]
    theirs = np.array([[p["left"], p["top"], p["width"], p["height"]] for p in params], float)
    ours = np.stack([found.x, found.y, found.width, found.height], 1).astype(float)
    scale = np.array([width, height, width, height])
    # Quantiles of 4,000 draws each: two samples of one distribution differ by about 1% of the range.
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert (abs(np.quantile(ours, q, axis=0) - np.quantile(theirs, q, axis=0)) / scale).max() < 0.04, q


def test_flips_come_at_their_rate() -> None:
    assert not windows(Augment(flip=0), 224, 300, 300).flip.any()
    assert windows(Augment(flip=1), 224, 300, 300).flip.all()
    assert abs(windows(Augment(flip=0.25), 224, 300, 300).flip.mean() - 0.25) < 0.03


def test_padded_windows_take_every_offset_equally() -> None:
    found = windows(Augment(crop="padded", padding=4), 32, 32, 32, 81_000)
    offsets, counts = np.unique(np.stack([found.x, found.y]), axis=1, return_counts=True)
    assert offsets.min() == -4 and offsets.max() == 4 and len(counts) == 81
    assert abs(counts / 1000 - 1).max() < 0.15


@pytest.mark.parametrize("short_side", [256, 232, 0])
def test_evaluation_windows_are_torchvisions_to_the_pixel(short_side: int) -> None:
    random = np.random.default_rng(0)
    sizes = np.concatenate([random.integers(60, 700, (60, 2)), [[256, 256], [224, 500], [500, 223], [100, 100]]])
    width, height, window = evaluation_windows(short_side, 224, *sizes.T)
    transform = [v2.Resize(short_side)] if short_side else []
    for i, (w, h) in enumerate(sizes):
        # A picture whose pixel values are its coordinates, at the resized size: the crop tells where it was taken.
        resized = v2.Compose([*transform])(torch.zeros(1, h, w)) if transform else torch.zeros(1, h, w)
        assert (width[i], height[i]) == (resized.shape[2], resized.shape[1])
        rows, columns = torch.meshgrid(torch.arange(height[i]) + 1, torch.arange(width[i]) + 1, indexing="ij")
        crop = v2.CenterCrop(224)(torch.stack([rows, columns]))
        inside = crop[:, crop[0] > 0].reshape(2, -1)
        expected_y, expected_x = inside.amin(1) - 1
        assert max(window.y[i], 0) == expected_y and max(window.x[i], 0) == expected_x
        if width[i] < 224:
            assert (crop[1].amax(0) > 0).nonzero()[0, 0] == -window.x[i]


def test_alternating_flips_turn_over_each_epoch() -> None:
    n, options = 400, Augment(alternate_flip=True)
    sizes = np.full(n, 64), np.full(n, 64)
    keys = [(np.full(n, epoch), np.arange(n), np.zeros(n, int)) for epoch in range(4)]
    first, second, third, fourth = (training_windows(options, 32, 0, key, sizes).flip for key in keys)
    assert abs(first.mean() - 0.5) < 0.1
    assert (first == ~second).all() and (first == third).all() and (second == fourth).all()
