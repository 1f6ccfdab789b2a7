"""The augmentation operations on a Pillow image, as torchvision calls them: what trainer/data/ops.py does in DALI."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from trainer.data.policies import Op


def apply(image: Image.Image, op: int, magnitude: float, fill: int = 0, bilinear: bool = False) -> Image.Image:
    """The RGB image after one operation; the magnitude in the unit of the Op, `fill` from outside the image."""
    m = float(magnitude)
    plain = {"interpolation": InterpolationMode.BILINEAR if bilinear else InterpolationMode.NEAREST, "fill": [fill] * 3}
    if op in (Op.SHEAR_X, Op.SHEAR_Y):
        degrees = math.degrees(math.atan(m))
        shear = [degrees, 0.0] if op == Op.SHEAR_X else [0.0, degrees]
        return F.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0, 0], **plain)
    if op in (Op.TRANSLATE_X, Op.TRANSLATE_Y):
        pixels = [int(m), 0] if op == Op.TRANSLATE_X else [0, int(m)]
        return F.affine(image, angle=0.0, translate=pixels, scale=1.0, shear=[0.0, 0.0], **plain)
    if op == Op.ROTATE:
        return F.rotate(image, m, **plain)
    return _COLOURS[Op(op)](image, m)


def _solarize_add(image: Image.Image, m: float) -> Image.Image:
    """timm's, for which torchvision has no function."""
    pixels = np.asarray(image)
    return Image.fromarray(np.where(pixels < 128, pixels + int(m), pixels).astype(np.uint8))


def _hue(image: Image.Image, m: float) -> Image.Image:
    # Pillow's own works on a byte of hue and loses levels; torchvision's tensor code does not.
    return F.to_pil_image(F.adjust_hue(F.pil_to_tensor(image), m))


_COLOURS = {
    Op.IDENTITY: lambda image, m: image,
    Op.BRIGHTNESS: F.adjust_brightness,
    Op.COLOR: F.adjust_saturation,
    Op.CONTRAST: F.adjust_contrast,
    Op.SHARPNESS: F.adjust_sharpness,
    Op.POSTERIZE: lambda image, m: F.posterize(image, int(m)),
    Op.SOLARIZE: F.solarize,
    Op.AUTO_CONTRAST: lambda image, m: F.autocontrast(image),
    Op.EQUALIZE: lambda image, m: F.equalize(image),
    Op.INVERT: lambda image, m: F.invert(image),
    Op.SOLARIZE_ADD: _solarize_add,
    Op.HUE: _hue,
}
