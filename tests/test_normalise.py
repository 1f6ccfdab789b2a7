"""The CPU's batches are made in memory that is used again, and never while a tensor still shares it."""

from __future__ import annotations

import numpy as np
import torch

from trainer.data.normalise import Normaliser


def batch(normaliser: Normaliser, value: int, side: int = 8) -> torch.Tensor:
    images = [torch.full((10, 10, 3), value, dtype=torch.uint8)] * 2
    futures, out = normaliser.begin(images, np.full((2, 2), side), np.zeros((2, 2), int), side, np.zeros(2))
    for future in futures:
        future.result()
    return out


def test_memory_is_used_again_once_no_tensor_shares_it() -> None:
    normaliser = Normaliser(1, (0, 0, 0), (1 / 255,) * 3)
    first = batch(normaliser, 1)
    address, part = first.data_ptr(), first[0]
    del first
    second = batch(normaliser, 2)
    assert second.data_ptr() != address and (part == 1).all(), "a view of it holds it"
    del part
    assert batch(normaliser, 3).data_ptr() == address
    assert (second == 2).all()


def test_larger_images_get_larger_memory() -> None:
    normaliser = Normaliser(2, (0, 0, 0), (1 / 255,) * 3)
    for side in (8, 16, 12):
        out = batch(normaliser, side, side)
        assert out.shape == (2, side, side, 3) and (out == side).all()
        del out


def test_only_what_is_to_be_mirrored_is() -> None:
    image = torch.arange(8 * 8 * 3, dtype=torch.uint8).view(8, 8, 3)
    fed = [image, image], np.full((2, 2), 8), np.zeros((2, 2), int), 8, np.array([0, 1])
    futures, out = Normaliser(1, (0, 0, 0), (1 / 255,) * 3).begin(*fed)
    for future in futures:
        future.result()
    assert (out[0] == image).all() and (out[1] == image.flip(1)).all()
