"""The augmentation operations in the DALI graph: it executes what trainer/data/policies.py has drawn, and draws none.

Each layer sends every image of the batch down one branch of a tree of DALI conditionals, so that an image pays only for
its own operation; branches that no policy option can reach are not built. The caller's pipeline must therefore be made
with `@pipeline_def(enable_conditionals=True)`. Every operation means what PIL's does through torchvision: a test
compares each of them, on the CPU. All operators exist for the GPU too, but have not been run on one.

Two operations of RandAugment cost 27% of the images a second and core of a plain 224 px graph on the CPU, DALI's own
nvidia.dali.auto_aug, which draws its own numbers, 26%. With a GPU they run there, beside the training.
What was tried stands with each operation; times are microseconds of one core for a 224 px image.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from nvidia.dali import fn, math, types

from trainer.data.policies import Op, Policy, Recipes, layers

# Values are cut to whole grey levels by PIL and rounded by DALI. Not 0.5, or a whole number less rounding error falls.
_CUT = 0.499
_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # PIL's "L"
_BLUR = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL's ImageFilter.SMOOTH
_ITSELF = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)


class _Kind(IntEnum):
    """A branch: all Ops that one piece of graph can execute, told apart by their numbers."""

    IDENTITY = 0
    WARP = 1
    BRIGHTNESS = 2
    CONTRAST = 3
    COLOR = 4
    SHARPNESS = 5
    POSTERIZE = 6
    SOLARIZE = 7
    SOLARIZE_ADD = 8
    AUTO_CONTRAST = 9
    EQUALIZE = 10
    HUE = 11


_KIND = {
    **{Op[kind.name]: kind for kind in _Kind if kind != _Kind.WARP},
    **dict.fromkeys((Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE), _Kind.WARP),
    Op.INVERT: _Kind.SOLARIZE,  # from level 0 on
}
_KIND_OF = np.array([_KIND[op] for op in Op], np.int32)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What the graph must be able to do; all that it needs to know of the options."""

    layers: tuple[tuple[Op, ...], ...] = ()  # the operations each layer can come to
    erase: bool = False
    bilinear: bool = False
    fill: int = 0  # grey level from outside the image

    @property
    def inputs(self) -> int:
        """How many arrays `feed` returns."""
        return (2 if self.layers else 0) + (1 if self.erase else 0)


def steps(options: Policy) -> Steps:
    """The steps that these options ask for."""
    return Steps(
        layers=layers(options),
        erase=options.erase > 0,
        bilinear=options.interpolation == "bilinear",
        fill=options.fill,
    )


def feed(steps: Steps, recipes: Recipes, flips: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    """What the graph is fed for n images, one entry an image: `steps.inputs` arrays.

    Args:
        flips: bool (n,). The graph mirrors at its very end, torchvision before anything else: operations that know left
            from right are turned round here, so that the result is torchvision's.
        size: side of the images in pixels.
    """
    fed = ()
    if steps.layers:
        fed = (_KIND_OF[recipes.ops], _numbers(recipes, flips, size))
    return (*fed, recipes.boxes.astype(np.float32)) if steps.erase else fed


def apply(images, steps: Steps, inputs: list):
    """The graph node of uint8 HWC RGB images, after all layers. `inputs` are the nodes of what `feed` returns."""
    for layer, possible in enumerate(steps.layers):
        kinds = sorted({_KIND[op] for op in possible})
        images = _dispatch(kinds, images, inputs[0][layer], inputs[1][layer], steps)
    return images


def erase(images, steps: Steps, inputs: list):
    """The node of normalised, mirrored HWC images with zeros in the rectangles; what `feed` returns, as for `apply`.

    After normalising, because a uint8 cannot hold the mean colour, which is what a zero stands for.
    """
    if not steps.erase:
        return images
    box = inputs[-1]
    return fn.erase(images, anchor=box[0:2], shape=box[2:4], axis_names="HW", fill_value=0)


def _numbers(recipes: Recipes, flips: np.ndarray, size: int) -> np.ndarray:
    """The arguments of each operation in the form that its branch takes: float32 (n, layers, 3, 4)."""
    op, m = recipes.ops, recipes.magnitudes.astype(np.float64)
    numbers = np.zeros((*op.shape, 3, 4))
    numbers[..., 0, 0] = np.where(op == Op.POSTERIZE, 256 - 2.0 ** (8 - np.clip(m, 1, 8)), m)
    numbers[op == Op.INVERT, 0, 0] = 0
    sharper, colored = op == Op.SHARPNESS, op == Op.COLOR
    factor = m[sharper, None, None]
    numbers[sharper, :, :3] = factor * _ITSELF + (1 - factor) * _BLUR
    factor = m[colored, None, None]
    numbers[colored, :, :3] = factor * np.eye(3) + (1 - factor) * _GREY
    numbers[colored, :, 3] = -_CUT
    warped = _KIND_OF[op] == _Kind.WARP
    flipped = np.broadcast_to(flips[:, None], op.shape)[warped]
    numbers[warped, :2, :3] = _matrices(op[warped], m[warped], flipped, size)
    return numbers.astype(np.float32)


def _matrices(op: np.ndarray, magnitude: np.ndarray, flipped: np.ndarray, size: int) -> np.ndarray:
    """Output to input pixel coordinates, corners at whole numbers, as PIL's Image.transform takes them: (n, 2, 3)."""
    angle = np.deg2rad(np.where(op == Op.ROTATE, magnitude, 0))
    cos, sin, centre = np.cos(angle), np.sin(angle), size / 2
    matrix = np.stack([cos, -sin, centre * (1 - cos + sin), sin, cos, centre * (1 - cos - sin)], axis=1)
    for which, entry, sign in (
        (Op.SHEAR_X, 1, 1),
        (Op.TRANSLATE_X, 2, -1),
        (Op.SHEAR_Y, 3, 1),
        (Op.TRANSLATE_Y, 5, -1),
    ):
        matrix[:, entry] += np.where(op == which, sign * magnitude, 0)
    # Mirrored before and after: x becomes size - x on both sides of the map.
    a, b, c, d, e, f = matrix.T
    mirrored = np.stack([a, -b, size - a * size - c, -d, e, d * size + f], axis=1)
    return np.where(flipped[:, None], mirrored, matrix).reshape(-1, 2, 3)


def _dispatch(kinds: list[_Kind], images, kind, numbers, steps: Steps):
    """Halve the kinds until one is left: an image passes log2(12) splits, which move no pixels."""
    if len(kinds) == 1:
        return _execute(kinds[0], images, numbers, steps)
    middle = len(kinds) // 2
    if kind < int(kinds[middle]):
        out = _dispatch(kinds[:middle], images, kind, numbers, steps)
    else:
        out = _dispatch(kinds[middle:], images, kind, numbers, steps)
    return out


def _execute(kind: _Kind, images, numbers, steps: Steps):
    if kind == _Kind.IDENTITY:
        return images
    if kind == _Kind.WARP:
        interpolation = types.INTERP_LINEAR if steps.bilinear else types.INTERP_NN
        return fn.warp_affine(images, matrix=numbers[0:2, 0:3], interp_type=interpolation, fill_value=steps.fill)
    if kind == _Kind.BRIGHTNESS:
        return fn.brightness(images, brightness=numbers[0, 0], brightness_shift=-_CUT / 255)
    if kind == _Kind.COLOR:
        # 1,250, as fn.saturation, which rounds where PIL cuts. A weighted sum with the grey image by fn.filter takes
        # 500, but rounds too, and must pass the image off as two very wide rows.
        return fn.coord_transform(images, MT=numbers, dtype=types.UINT8)
    parameter = _beside(images, numbers[0, 0])
    if kind == _Kind.SHARPNESS:
        return _sharpness(images, _beside(images, numbers[0:3, 0:3]))
    if kind == _Kind.POSTERIZE:
        return images & fn.cast(parameter, dtype=types.UINT8)
    if kind == _Kind.SOLARIZE:
        return images ^ ((images >= fn.cast(parameter, dtype=types.INT16)) * _level(255))
    if kind == _Kind.SOLARIZE_ADD:
        return images + (images < _level(128)) * fn.cast(parameter, dtype=types.UINT8)
    if kind == _Kind.HUE:
        return _hue(images, parameter)
    return {_Kind.CONTRAST: _contrast, _Kind.AUTO_CONTRAST: _auto_contrast, _Kind.EQUALIZE: _equalize}[kind](
        images, parameter
    )


def _beside(images, node):
    """A CPU node on the images' device, as arithmetic asks for."""
    return node.gpu() if images.device == "gpu" else node


def _level(value: int):
    return types.Constant(value, dtype=types.UINT8)


def _contrast(images, factor):
    # 1,100. fn.brightness_contrast takes 200, but wants the centre on the CPU, where a GPU's image has none.
    grey = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
    centre = math.floor(fn.reductions.mean(grey) + 0.5)  # PIL's is a whole number
    return fn.cast(images * factor + (centre * (1 - factor) - _CUT), dtype=types.UINT8)


def _auto_contrast(images, _):
    # 1,200. fn.normalize takes 800, with the same objection.
    low = fn.reductions.min(images, axes=(0, 1), keep_dims=True)
    high = fn.reductions.max(images, axes=(0, 1), keep_dims=True)
    flat = low == high  # such a channel stays as it is
    gain = fn.cast(flat, dtype=types.FLOAT) + (255.0 * (low < high)) / fn.cast((high - low) + flat, dtype=types.FLOAT)
    return fn.cast((images - low * (low < high)) * gain - _CUT, dtype=types.UINT8)


def _equalize(images, _):
    # DALI's is OpenCV's, which counts the pixels up to and with a level, PIL those below it: 3.6 grey levels apart on
    # average. Counted from above, in the negative, it is PIL's: (pixels below) / (pixels not of the highest level).
    equalize = getattr(fn, "equalize", None) or fn.experimental.equalize  # its name before DALI 2
    return equalize(images ^ _level(255)) ^ _level(255)


def _sharpness(images, kernel):
    # Blur and blend in one kernel, rounded where PIL cuts: 400 instead of 1,700. PIL leaves the outermost pixels alone.
    convolve = getattr(fn, "filter", None) or fn.experimental.filter
    inner = convolve(images, kernel, mode="valid")
    middle = fn.cat(images[1:-1, 0:1], inner, images[1:-1, -1:], axis=1)
    return fn.cat(images[0:1], middle, images[-1:], axis=0)


def _hue(images, share):
    """Hue moved by a share of a turn at equal value and chroma, as torchvision's adjust_hue.

    DALI's fn.hue rotates about the grey axis instead, which changes brightness. These many passes cost several ms.
    """
    value = fn.reductions.max(images, axes=(2,), keep_dims=True)
    chroma = fn.cast(value - fn.reductions.min(images, axes=(2,), keep_dims=True), dtype=types.FLOAT)
    red, green, blue = (fn.cast(images[:, :, c : c + 1], dtype=types.FLOAT) for c in range(3))
    is_red = value == images[:, :, 0:1]
    is_green = (value == images[:, :, 1:2]) & (is_red ^ True)
    is_blue = (is_red | is_green) ^ True
    over = chroma + (chroma == 0.0)
    hue = (
        is_red * (green - blue) / over + is_green * ((blue - red) / over + 2.0) + is_blue * ((red - green) / over + 4.0)
    )
    k = hue + 6.0 * share + types.Constant(np.array([[[5, 3, 1]]], np.float32))
    k = k - 6.0 * math.floor(k / 6.0)
    return fn.cast(value - chroma * math.clamp(math.min(k, 4.0 - k), 0.0, 1.0), dtype=types.UINT8)
