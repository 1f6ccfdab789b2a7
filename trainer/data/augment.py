"""The crop window and the flip of a sample: pure functions of (seed, epoch, sample, repeat).

Windows are in the pixels of the stored image (EXIF orientation ignored, as torchvision and timm do), before any
resize, so that a decoder can decode just the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.config import Augment
from trainer.data.philox import uniforms

ATTEMPTS = 10  # as torchvision's RandomResizedCrop; then the centre crop
_DRAWS = 2 * ATTEMPTS + 3  # areas, ratios; x, y, flip
Keys = tuple[np.ndarray, np.ndarray, np.ndarray]  # epochs, rows and repeats of n samples, integers (n,)


@dataclass(frozen=True)
class Windows:
    """What to cut out of n images. x, y may be negative where a padded crop begins outside the image."""

    x: np.ndarray  # int32 (n,)
    y: np.ndarray
    width: np.ndarray
    height: np.ndarray
    flip: np.ndarray  # bool (n,)


def training_windows(
    options: Augment, size: int, seed: int, keys: Keys, sizes: tuple[np.ndarray, np.ndarray]
) -> Windows:
    """The training crops of n images.

    Args:
        size: side of the crop that reaches the network, in pixels.
        keys: what tells one draw from another.
        sizes: widths and heights of the stored images, in pixels, each (n,).
    """
    epochs, rows, repeats = keys
    widths, heights = sizes
    draws = uniforms(seed, epochs, rows, _DRAWS, repeats)
    u_x, u_y, u_flip = draws[:, -3], draws[:, -2], draws[:, -1]
    flip = u_flip < options.flip
    if options.alternate_flip:
        at_first = uniforms(seed, np.zeros_like(epochs), rows, _DRAWS, repeats)[:, -1]
        flip = (at_first < options.flip) ^ (epochs % 2 == 1)
    if options.crop == "resized":
        width, height, central = _resized(options, draws, widths, heights)
        # torchvision's fallback, when no attempt fits, is the centre crop and not a random one.
        x = np.where(central, (widths - width) // 2, np.floor(u_x * (widths - width + 1)))
        y = np.where(central, (heights - height) // 2, np.floor(u_y * (heights - height + 1)))
    else:
        width = height = np.full(len(widths), size)
        pad = options.padding if options.crop == "padded" else 0
        room_x, room_y = widths + 2 * pad - size, heights + 2 * pad - size
        if options.crop == "padded":
            x = np.floor(u_x * (np.maximum(room_x, 0) + 1)) - pad
            y = np.floor(u_y * (np.maximum(room_y, 0) + 1)) - pad
        else:
            x, y = _middle(room_x), _middle(room_y)
    return Windows(*(np.asarray(v, np.int32) for v in (x, y, width, height)), flip)


def _resized(options: Augment, draws: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, ...]:
    """(width, height, central) of RandomResizedCrop: the first of ten drawn shapes that fits into the image."""
    area = (widths * heights)[:, None] * _between(options.scale, draws[:, :ATTEMPTS])
    ratio = np.exp(_between(np.log(options.ratio), draws[:, ATTEMPTS : 2 * ATTEMPTS]))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (h > 0) & (w <= widths[:, None]) & (h <= heights[:, None])
    first = np.argmax(fits, axis=1)
    n = np.arange(len(widths))
    central = ~fits.any(axis=1)
    # Fallback: the largest centre crop whose ratio is within the range.
    whole = widths / heights
    low, high = options.ratio
    fallback_w = np.where(whole > high, np.rint(heights * high), widths)
    fallback_h = np.where(whole < low, np.rint(widths / low), heights)
    return np.where(central, fallback_w, w[n, first]), np.where(central, fallback_h, h[n, first]), central


def evaluation_windows(
    short_side: int, size: int, widths: np.ndarray, heights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Windows]:
    """(resized widths, resized heights, centre windows in the resized image) as torchvision's Resize and CenterCrop.

    The long side is cut to a whole number, not rounded, and the crop begins at round(half the rest): torchvision's
    arithmetic, to the pixel. short_side = 0 leaves the size alone.
    """
    if short_side:
        wide = widths > heights
        width = np.where(wide, short_side * widths // heights, short_side)
        height = np.where(wide, short_side, short_side * heights // widths)
    else:
        width, height = widths, heights
    sides = np.full(len(widths), size, np.int32)
    window = Windows(_middle(width - size), _middle(height - size), sides, sides, np.zeros(len(widths), bool))
    return width.astype(np.int32), height.astype(np.int32), window


def _middle(room: np.ndarray) -> np.ndarray:
    """Where a centred crop begins; negative where it is larger than the image, with torchvision's two roundings."""
    return np.where(room < 0, -(-room // 2), np.rint(room / 2)).astype(np.int32)


def _between(low_high: np.ndarray | list[float], u: np.ndarray) -> np.ndarray:
    low, high = low_high
    return low + (high - low) * u
