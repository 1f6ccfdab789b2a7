"""Mixup and CutMix on the device, reproducible for any number of ranks.

The batch of a global step stands in one row, positions 0 to G - 1. The image at position p is mixed with that at
position p ^ 1 (0 with 1, 2 with 3): the order is a random permutation, so neighbours are as good as any. How strongly,
and in which box, is a function of (seed, step, p // group) alone. Pixels and labels therefore do not depend on the
number of ranks, on the batch per GPU or on accumulation, as long as no forward batch cuts a pair in two: each must hold
an even number of images. What they do depend on is `global_batch_size` and `mix.group`.

Zhang et al., "mixup" (arXiv:1710.09412); Yun et al., "CutMix" (arXiv:1905.04899). The arithmetic is torchvision's
(transforms/v2/_augment.py). Its one strength for the whole batch of a rank is group = batch per GPU here; group = 2 is
timm's mode "pair".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from trainer.config_augment import Mix
from trainer.data.philox import MIX, uniforms

_GRID = 4096


@dataclass(frozen=True)
class Strengths:
    """What happens to n images; the share is that of the image itself, the rest its partner's."""

    share: np.ndarray  # of the label, float32 (n,)
    inside: np.ndarray  # of each pixel in the box, float32 (n,)
    outside: np.ndarray  # of all other pixels, float32 (n,)
    box: np.ndarray  # x1, y1, x2, y2 in pixels, the ends excluded, int64 (n, 4)


def mix(
    images: torch.Tensor, labels: torch.Tensor, options: Mix, classes: int, seed: int, step: int, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A forward batch, mixed: (images, targets float32 (n, classes) that sum to 1).

    Dense targets and not two labels with a share: cross-entropy (with its own label smoothing) and binary cross-entropy
    both take them as they are, and at 1,000 classes they cost what a channel of 32 x 32 pixels does.
    Draws on the host, copies 28 bytes an image to the device, and never waits for it.

    Args:
        images: float (n, 3, height, width) of any memory format, which is kept; not changed. n is even.
        labels: int64 (n,).
        step: the global step.
        first: the global position of images[0] within its step, even.
    """
    n, _, height, width = images.shape
    assert n % 2 == 0 and first % 2 == 0, f"{n} images from position {first} cut a pair in two"
    drawn = strengths(options, seed, step, np.arange(first, first + n), (height, width))
    table = np.concatenate([np.stack([drawn.share, drawn.inside, drawn.outside], 1), drawn.box], 1, dtype=np.float32)
    packed = torch.from_numpy(table)
    if images.is_cuda:
        packed = packed.pin_memory().to(images.device, non_blocking=True)  # else the copy would wait
    share, inside, outside, x1, y1, x2, y2 = packed.unbind(1)
    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device)[:, None]
    in_box = _between(x, x1, x2) & _between(y, y1, y2)
    weight = torch.where(in_box, inside[:, None, None], outside[:, None, None]).to(images.dtype)[:, None]
    # Compared and not scattered: scattering sums in any order on a GPU, which `deterministic` would refuse.
    every = torch.arange(classes, device=images.device)
    own, partner = labels[:, None] == every, _swap(labels)[:, None] == every
    targets = own * share[:, None] + partner * (1 - share[:, None])
    return torch.lerp(_swap(images), images, weight), targets


def strengths(options: Mix, seed: int, step: int, positions: np.ndarray, size: tuple[int, int]) -> Strengths:
    """What the images at these positions of the global batch get, each from its group's own draw.

    Args:
        positions: integers (n,).
        size: height and width in pixels.
    """
    height, width = size
    groups = positions // options.group if options.group else np.zeros_like(positions)
    # Whether, which, how much, x, y of each group.
    u = uniforms(seed, np.full(len(groups), step), groups, 5, stream=MIX)
    cut = np.full(len(u), options.cutmix > 0)
    if options.cutmix and options.mixup:
        cut = u[:, 1] < options.cutmix_share
    share = np.where(cut, _beta(options.cutmix, u[:, 2]), _beta(options.mixup, u[:, 2]))
    share = np.where(u[:, 0] < options.chance, share, 1.0)
    # torchvision's box: centred anywhere, cut at the image's edge, and the label's share is what is left of the area.
    half = 0.5 * np.sqrt(1 - share)
    half_w, half_h = np.trunc(half * width), np.trunc(half * height)
    x, y = np.floor(u[:, 3] * width), np.floor(u[:, 4] * height)
    box = np.stack(
        [
            np.maximum(x - half_w, 0),
            np.maximum(y - half_h, 0),
            np.minimum(x + half_w, width),
            np.minimum(y + half_h, height),
        ],
        axis=1,
    ).astype(np.int64)
    left = 1 - (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / (width * height)
    each = (np.where(cut, left, share), np.where(cut, 0.0, share), np.where(cut, 1.0, share))
    return Strengths(*(v.astype(np.float32) for v in each), box)


def _beta(alpha: float, u: np.ndarray) -> np.ndarray:
    """Beta(alpha, alpha) by inversion, so that one number makes one draw; numpy's own stream may change (NEP 19)."""
    if alpha == 0:
        return np.ones_like(u)
    cumulative, grid = _quantiles(alpha)
    low = 0.5 * np.interp(2 * np.minimum(u, 1 - u), cumulative, grid) ** (1 / alpha)
    return np.where(u < 0.5, low, 1 - low)


@lru_cache
def _quantiles(alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """(probability, s) with x = s ** (1 / alpha) / 2 of the lower half of Beta(alpha, alpha).

    In s the density is (1 - x) ** (alpha - 1), without the pole that x ** (alpha - 1) has at 0 for alpha below 1.
    """
    s = np.linspace(0, 1, _GRID) ** max(1.0, alpha)  # what matters lies at small s when alpha is large
    density = (1 - 0.5 * s ** (1 / alpha)) ** (alpha - 1)
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(s))])
    return cumulative / cumulative[-1], s


def _between(at: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Which coordinates, of shape (w,) or (h, 1), lie within [low, high) of each image: bool (n, 1, w) or (n, h, 1)."""
    return (at >= low[:, None, None]) & (at < high[:, None, None])


def _swap(rows: torch.Tensor) -> torch.Tensor:
    """Each row's partner in its place; the memory format is kept."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
