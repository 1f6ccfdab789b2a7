"""Which photometric and geometric operations an image gets, and how strong: pure functions of (seed, epoch, sample,
repeat).

What comes out names each operation's own argument (degrees, pixels, bits, a blend factor), so that the graph that
executes it (trainer/data/ops.py) knows nothing of policies. The spaces, bins, signs and probabilities are those of
torchvision 0.29 (transforms/v2/_auto_augment.py, _color.py, _augment.py) and, for `convention=timm`, of timm 1.0
(data/auto_augment.py: "rand-m7-mstd0.5-inc1" is magnitude=7, magnitude_std=0.5, increasing=true).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from trainer.config_augment import FULL_MAGNITUDE
from trainer.config_augment import Policy as Policy
from trainer.data.philox import AUGMENT_OPS, uniforms

ATTEMPTS = 10  # as torchvision's RandomErasing
# Columns of the draws. The policy comes last because its width depends on the number of layers: so no option of one
# of the three moves the draws of another.
_ERASE, _JITTER, _POLICY, _PER_LAYER = slice(0, 23), slice(24, 32), 32, 5


class Op(IntEnum):
    """One operation, and the unit of its magnitude."""

    IDENTITY = 0
    SHEAR_X = 1  # pixels to the left for each row further down
    SHEAR_Y = 2  # pixels up for each column further right
    TRANSLATE_X = 3  # pixels to the right
    TRANSLATE_Y = 4  # pixels down
    ROTATE = 5  # degrees counter-clockwise about the centre
    BRIGHTNESS = 6  # the next four: blend factor; 1 changes nothing, 0 is black, grey, blurred
    COLOR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10  # bits that are kept, 1 to 8
    SOLARIZE = 11  # grey level from which on a value is inverted, 0 to 256
    AUTO_CONTRAST = 12  # these three: none
    EQUALIZE = 13
    INVERT = 14
    SOLARIZE_ADD = 15  # grey levels added to values below 128
    HUE = 16  # share of a full turn, -0.5 to 0.5


@dataclass(frozen=True)
class Recipes:
    """What happens to n images, in the order of the layers, and the rectangle that is erased at the very end."""

    ops: np.ndarray  # Op, int32 (n, layers)
    magnitudes: np.ndarray  # in the unit of the Op, sign included, float32 (n, layers)
    boxes: np.ndarray  # y, x, height, width in pixels of the flipped crop, int32 (n, 4); zeros: nothing


# An operation's argument is start + reach * (magnitude / full), the reach negated half the time where it is signed.
_GEOMETRY = (Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE)
_ENHANCE = (Op.BRIGHTNESS, Op.COLOR, Op.CONTRAST, Op.SHARPNESS)
_PLAIN = (Op.AUTO_CONTRAST, Op.EQUALIZE)
_TORCHVISION = (Op.IDENTITY, *_GEOMETRY, *_ENHANCE, Op.POSTERIZE, Op.SOLARIZE, *_PLAIN)
_TIMM = (*_PLAIN, Op.INVERT, Op.ROTATE, Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD, *_ENHANCE, *_GEOMETRY[:4])

_A, _E, _I, _P, _R, _S, _C = (
    Op.AUTO_CONTRAST, Op.EQUALIZE, Op.INVERT, Op.POSTERIZE, Op.ROTATE, Op.SOLARIZE, Op.COLOR
)  # fmt: skip
# AutoAugment's ImageNet policy as torchvision has it: (op, probability, bin of 0 to 9) twice.
_AUTOAUGMENT = (
    (_P, 0.4, 8, _R, 0.6, 9), (_S, 0.6, 5, _A, 0.6, 0), (_E, 0.8, 0, _E, 0.6, 0), (_P, 0.6, 7, _P, 0.6, 6),
    (_E, 0.4, 0, _S, 0.2, 4), (_E, 0.4, 0, _R, 0.8, 8), (_S, 0.6, 3, _E, 0.6, 0), (_P, 0.8, 5, _E, 1.0, 0),
    (_R, 0.2, 3, _S, 0.6, 8), (_E, 0.6, 0, _P, 0.4, 6), (_R, 0.8, 8, _C, 0.4, 0), (_R, 0.4, 9, _E, 0.6, 0),
    (_E, 0.0, 0, _E, 0.8, 0), (_I, 0.6, 0, _E, 1.0, 0), (_C, 0.6, 4, Op.CONTRAST, 1.0, 8), (_R, 0.8, 8, _C, 1.0, 2),
    (_C, 0.8, 8, _S, 0.8, 7), (Op.SHARPNESS, 0.4, 7, _I, 0.6, 0), (Op.SHEAR_X, 0.6, 5, _E, 1.0, 0),
    (_C, 0.4, 0, _E, 0.6, 0), (_E, 0.4, 0, _S, 0.2, 4), (_S, 0.6, 5, _A, 0.6, 0), (_I, 0.6, 0, _E, 1.0, 0),
    (_C, 0.6, 4, Op.CONTRAST, 1.0, 8), (_E, 0.8, 0, _E, 0.6, 0),
)  # fmt: skip


def layers(options: Policy) -> tuple[tuple[Op, ...], ...]:
    """The operations that each layer can come to, so that a graph holds no more than it needs; () if all is off."""
    if options.policy == "autoaugment":
        found = [{Op.IDENTITY, *(row[3 * i] for row in _AUTOAUGMENT)} for i in (0, 1)]
    elif options.policy == "trivialaugment":
        found = [set(_TORCHVISION)]
    elif options.policy == "randaugment":
        found = [{*_choices(options), *([Op.IDENTITY] if _chance(options) < 1 else [])}] * options.num_ops
    else:
        found = []
    jitter = {op for op, _, _ in _jitters(options)}
    return tuple(tuple(sorted(ops)) for ops in [*found, *[jitter] * len(jitter)])


def draw(
    options: Policy, size: int, seed: int, epochs: np.ndarray, rows: np.ndarray, repeats: int | np.ndarray = 0
) -> Recipes:
    """The recipes of n images that have been cropped to size x size pixels.

    Args:
        epochs, rows: integers of shape (n,).
        repeats: which of a sample's repetitions within the epoch, from 0; a number or shape (n,).
    """
    count = _POLICY + _PER_LAYER * max(options.num_ops, 2)
    u = uniforms(seed, epochs, rows, count, repeats, stream=AUGMENT_OPS)
    per_layer = [u[:, i : i + _PER_LAYER] for i in range(_POLICY, count, _PER_LAYER)]
    if options.policy == "autoaugment":
        drawn = _autoaugment(options, size, per_layer)
    elif options.policy == "trivialaugment":
        drawn = [_trivial(size, per_layer[0])]
    elif options.policy == "randaugment":
        drawn = [_random(options, size, here) for here in per_layer[: options.num_ops]]
    else:
        drawn = []
    drawn += _jitter(options, u[:, _JITTER])
    ops = np.zeros((len(rows), len(drawn)), np.int32)
    magnitudes = np.zeros((len(rows), len(drawn)), np.float32)
    for layer, (op, magnitude) in enumerate(drawn):
        ops[:, layer], magnitudes[:, layer] = op, magnitude
    return Recipes(ops, magnitudes, _boxes(options, size, u[:, _ERASE]))


def _choices(options: Policy) -> tuple[Op, ...]:
    return _TIMM if options.convention == "timm" else _TORCHVISION


def _chance(options: Policy) -> float:
    if options.op_chance is not None:
        return options.op_chance
    return 0.5 if options.convention == "timm" else 1.0


def _random(options: Policy, size: int, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One layer of RandAugment."""
    full = FULL_MAGNITUDE[options.convention]
    if math.isinf(options.magnitude_std):
        magnitude = options.magnitude * u[:, 3]
    else:
        # Box and Muller: exact, and one sample's noise costs two of its own draws and nothing of its neighbours'.
        normal = np.sqrt(-2 * np.log1p(-u[:, 3])) * np.cos(2 * np.pi * u[:, 4])
        magnitude = np.clip(options.magnitude + options.magnitude_std * normal, 0, full)
    choices = np.array(_choices(options))
    op = choices[(u[:, 0] * len(choices)).astype(int)]
    if options.convention == "timm":
        argument = _timm_argument(op, magnitude / full, u[:, 2] < 0.5, size, options.increasing)
    else:
        argument = _argument(op, magnitude / full, u[:, 2] < 0.5, _reach(size))
    applied = u[:, 1] < _chance(options)
    return np.where(applied, op, Op.IDENTITY), np.where(applied, argument, 0)


def _trivial(size: int, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The one operation of TrivialAugmentWide: any op, any of 31 bins."""
    op = np.array(_TORCHVISION)[(u[:, 0] * len(_TORCHVISION)).astype(int)]
    reach = {**_reach(size), **dict.fromkeys((Op.TRANSLATE_X, Op.TRANSLATE_Y), 32.0), Op.ROTATE: 135.0}
    reach |= dict.fromkeys((Op.SHEAR_X, Op.SHEAR_Y, *_ENHANCE), 0.99) | {Op.POSTERIZE: -6.0}
    return op, _argument(op, np.floor(u[:, 3] * 31) / 30, u[:, 2] < 0.5, reach)


def _autoaugment(options: Policy, size: int, u: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Both layers of one of the 25 sub-policies, each at its own probability."""
    rows = np.array(_AUTOAUGMENT)[(u[0][:, 0] * len(_AUTOAUGMENT)).astype(int)]
    drawn = []
    for layer in (0, 1):
        op, chance, level = rows[:, 3 * layer].astype(int), rows[:, 3 * layer + 1], rows[:, 3 * layer + 2]
        argument = _argument(op, level / 9, u[layer][:, 2] < 0.5, _reach(size))
        applied = u[layer][:, 1] < chance
        drawn.append((np.where(applied, op, Op.IDENTITY), np.where(applied, argument, 0)))
    return drawn


def _reach(size: int) -> dict[Op, float]:
    """torchvision's RandAugment and AutoAugment; what is not named has no magnitude."""
    reach = dict.fromkeys((Op.SHEAR_X, Op.SHEAR_Y), 0.3) | dict.fromkeys(_ENHANCE, 0.9)
    reach |= dict.fromkeys((Op.TRANSLATE_X, Op.TRANSLATE_Y), 150 / 331 * size)
    return {**reach, Op.ROTATE: 30.0, Op.POSTERIZE: -4.0, Op.SOLARIZE: -255.0}


def _argument(op: np.ndarray, share: np.ndarray, negative: np.ndarray, reach: dict[Op, float]) -> np.ndarray:
    """torchvision's argument of each op at `share` of its full reach."""
    value = np.array([reach.get(o, 0.0) for o in Op])[op] * share
    value = np.where(np.isin(op, (*_GEOMETRY, *_ENHANCE)) & negative, -value, value)
    value = value + np.array([{Op.POSTERIZE: 8, Op.SOLARIZE: 255}.get(o, float(o in _ENHANCE)) for o in Op])[op]
    value = np.where(np.isin(op, (Op.TRANSLATE_X, Op.TRANSLATE_Y)), np.trunc(value), value)
    value = np.where(op == Op.POSTERIZE, np.rint(value), value)
    # A grey level is a whole number: from 178.5 on is from 179 on. The slack is for the rounding of 255 * (1 - k / 30).
    return np.where(op == Op.SOLARIZE, np.ceil(value - 1e-4), value)


def _timm_argument(op: np.ndarray, share: np.ndarray, negative: np.ndarray, size: int, increasing: bool) -> np.ndarray:
    """timm's argument of each op at `share` of its full reach."""
    reach = {**_reach(size), **dict.fromkeys((Op.TRANSLATE_X, Op.TRANSLATE_Y), 0.45 * size)}
    value = np.array([reach.get(o, 0.0) for o in Op])[op] * share
    value = np.where(np.isin(op, (*_GEOMETRY, *_ENHANCE)) & negative, -value, value)
    bits, level = np.floor(4 * share), np.floor(256 * share)
    enhanced = 1 + value if increasing else 0.1 + 1.8 * share
    value = np.where(np.isin(op, _ENHANCE), enhanced, value)
    # timm goes down to 0 bits, a black image, which PIL has come to refuse.
    value = np.where(op == Op.POSTERIZE, np.maximum(4 - bits if increasing else bits, 1), value)
    value = np.where(op == Op.SOLARIZE, 256 - level if increasing else level, value)
    return np.where(op == Op.SOLARIZE_ADD, np.floor(110 * share), value)


def _jitters(options: Policy) -> list[tuple[Op, float, float]]:
    """(op, lowest, highest factor) of the parts of the colour jitter that are on."""
    parts = ((Op.BRIGHTNESS, options.brightness), (Op.CONTRAST, options.contrast), (Op.COLOR, options.saturation))
    found = [(op, max(0.0, 1 - width), 1 + width) for op, width in parts if width]
    return found + ([(Op.HUE, -options.hue, options.hue)] if options.hue else [])


def _jitter(options: Policy, u: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The layers of torchvision's ColorJitter: every part once, in an order drawn for each image."""
    parts = _jitters(options)
    if not parts:
        return []
    ops, low, high = (np.array(column) for column in zip(*parts))
    order = np.argsort(u[:, : len(parts)], axis=1, kind="stable")
    factors = low + (high - low) * u[:, 4 : 4 + len(parts)]
    return [(ops[order[:, i]], factors[np.arange(len(u)), order[:, i]]) for i in range(len(parts))]


def _boxes(options: Policy, size: int, u: np.ndarray) -> np.ndarray:
    """The rectangles of torchvision's RandomErasing: the first of ten shapes that is smaller than the image."""
    (least, most), (low, high) = options.erase_scale, np.log(options.erase_ratio)
    area = size * size * (least + (most - least) * u[:, :ATTEMPTS])
    ratio = np.exp(low + (high - low) * u[:, ATTEMPTS : 2 * ATTEMPTS])
    h, w = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (h < size) & (w < size)
    first, n = np.argmax(fits, axis=1), np.arange(len(u))
    h, w = h[n, first], w[n, first]
    y, x = np.floor(u[:, -3] * (size - h + 1)), np.floor(u[:, -2] * (size - w + 1))
    erased = (u[:, -1] < options.erase) & fits.any(axis=1)
    return np.where(erased[:, None], np.stack([y, x, h, w], axis=1), 0).astype(np.int32)
