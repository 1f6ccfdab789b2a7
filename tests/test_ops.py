"""The graph's operations are PIL's, as torchvision calls them: on drawn images and on real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from trainer.data import ops, pil_ops, policies
from trainer.data.policies import Op, Policy, Recipes

# A graph of one operation has no use for the input that chooses among them: DALI says so.
pytestmark = pytest.mark.filterwarnings("ignore:The external source node")

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def drawn(size: int = 96, count: int = 6) -> list[np.ndarray]:
    """Images with slopes, edges and noise; one is grey, one is flat, one uses few levels."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size] / size
    found = []
    for i in range(count - 3):
        waves = np.stack([np.sin((3 + i) * x + c) * np.cos((4 + c) * y + i) for c in range(3)], -1)
        disk = ((x - 0.3 - 0.2 * i) ** 2 + (y - 0.5) ** 2 < 0.05)[..., None] * np.array([90, -60, 40])
        found.append(np.clip(120 + 70 * waves + disk + random.normal(0, 6, waves.shape), 0, 255).astype(np.uint8))
    grey = np.repeat(found[0][..., :1], 3, axis=-1)
    return [*found, grey, np.full((size, size, 3), (200, 30, 90), np.uint8), found[1] // 64 * 50 + 20]


@pytest.fixture(scope="module")
def real(imagenet_sample: Path) -> list[np.ndarray]:
    files = sorted(imagenet_sample.rglob("*.JPEG"))[::25]
    crop = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])
    return [np.asarray(crop(Image.open(file).convert("RGB"))) for file in files]


def execute(images: list[np.ndarray], options: Policy, recipes: Recipes, flips: np.ndarray | None = None) -> np.ndarray:
    """What the graph makes of the images, mirrored last as in trainer/data/dali.py: uint8, or float where it erases."""
    size = images[0].shape[0]
    flips = np.zeros(len(images), bool) if flips is None else flips
    # Layers that these options would not reach are as good: the tests below choose operations one by one.
    reachable = tuple(tuple(Op(o) for o in np.unique(column)) for column in recipes.ops.T)
    steps = ops.Steps(
        layers=reachable, erase=options.erase > 0, bilinear=options.interpolation == "bilinear", fill=options.fill
    )
    fed = (images, flips.astype(np.int32), *ops.feed(steps, recipes, flips, size))
    assert len(fed) == 2 + steps.inputs

    @pipeline_def(
        batch_size=len(images), num_threads=1, device_id=None, prefetch_queue_depth=1, enable_conditionals=True
    )
    def graph():
        layouts = ["HWC"] + [""] * (len(fed) - 1)
        nodes, mirror, *inputs = fn.external_source(source=lambda: fed, num_outputs=len(fed), layout=layouts)
        out = ops.apply(nodes, steps, inputs)
        if steps.erase:
            out = fn.crop_mirror_normalize(
                out, mirror=mirror, mean=list(MEAN), std=list(STD), dtype=types.FLOAT, output_layout="HWC"
            )
            return ops.erase(out, steps, inputs)
        return fn.flip(out, horizontal=mirror)

    pipeline = graph()
    pipeline.build()
    (out,) = pipeline.run()
    return np.asarray(out.as_tensor())


def recipe(*layers: tuple[Op, float], count: int) -> Recipes:
    """The same operations for `count` images."""
    names, magnitudes = zip(*layers)
    shape = (count, len(layers))
    return Recipes(
        np.broadcast_to(np.array(names, np.int32), shape),
        np.broadcast_to(np.array(magnitudes, np.float32), shape),
        np.zeros((count, 4), np.int32),
    )


def torchvisions(op: Op, m: float, fill: int = 0, bilinear: bool = False) -> Callable:
    """torchvision's function for one operation, as its RandAugment calls it."""
    return lambda image: pil_ops.apply(image, op, m, fill, bilinear)


def expected(images: list[np.ndarray], function: Callable) -> np.ndarray:
    return np.stack([np.asarray(function(Image.fromarray(image))) for image in images])


# (op, magnitude, mean absolute difference allowed in grey levels, largest one). Only the four with a mean above 0.1
# round differently from PIL: COLOR does not round the grey image, SHARPNESS rounds where PIL cuts, EQUALIZE scales by
# 255 / (N - last) where PIL divides by a whole number of pixels, HUE is torchvision's up to its rounding.
COLORS = [
    (Op.IDENTITY, 0, 0, 0),
    *[(Op.BRIGHTNESS, m, 0.01, 1) for m in (0.1, 0.73, 1.9)],
    *[(Op.COLOR, m, 0.3, 1) for m in (0.1, 0.73, 1.9)],
    *[(Op.CONTRAST, m, 0.01, 1) for m in (0.1, 0.73, 1.9)],
    *[(Op.SHARPNESS, m, 0.6, 1) for m in (0.1, 0.73, 1.9)],
    *[(Op.POSTERIZE, m, 0, 0) for m in (1, 4, 7, 8)],
    *[(Op.SOLARIZE, m, 0, 0) for m in (0, 1, 128, 179, 255, 256)],
    (Op.AUTO_CONTRAST, 0, 0.02, 1),
    (Op.EQUALIZE, 0, 0.7, 1),
    (Op.INVERT, 0, 0, 0),
    *[(Op.SOLARIZE_ADD, m, 0, 0) for m in (0, 55, 128)],
    *[(Op.HUE, m, 0.6, 2) for m in (-0.5, -0.13, 0.02, 0.4)],
]


@pytest.mark.parametrize("source", ["drawn", "real"])
def test_colour_operations_equal_torchvisions(source: str, request: pytest.FixtureRequest) -> None:
    images = drawn(224) if source == "drawn" else request.getfixturevalue("real")
    # All operations in one pipeline, so that the branches are taken side by side, as in training.
    recipes = [recipe((op, m), count=len(images)) for op, m, _, _ in COLORS]
    together = Recipes(*(np.concatenate([getattr(r, f) for r in recipes]) for f in ("ops", "magnitudes", "boxes")))
    ours = execute(images * len(COLORS), Policy(), together).reshape(len(COLORS), len(images), *images[0].shape)
    for (op, m, mean, most), found in zip(COLORS, ours):
        delta = abs(found.astype(float) - expected(images, torchvisions(op, m)))
        assert delta.mean() <= mean and delta.max() <= most, (op.name, m, delta.mean(), delta.max())


# (op, magnitude, share of pixels that may differ): a nearest sample that falls between two pixels may go either way,
# and at 135 degrees, or a shear of exactly 0.2, many do.
GEOMETRY = [
    *[(op, m, 0.002) for op in (Op.SHEAR_X, Op.SHEAR_Y) for m in (-0.99, -0.3, 0.07, 0.3)],
    *[(op, m, 0) for op in (Op.TRANSLATE_X, Op.TRANSLATE_Y) for m in (-30, 7, 32)],
    *[(Op.ROTATE, m, 0.002) for m in (-27.5, 9, 90, 30)],
    (Op.ROTATE, -135, 0.01),
]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("source", ["drawn", "real"])
def test_geometric_operations_equal_torchvisions(source: str, flip: bool, request: pytest.FixtureRequest) -> None:
    images = drawn() if source == "drawn" else request.getfixturevalue("real")
    recipes = [recipe((op, m), count=len(images)) for op, m, _ in GEOMETRY]
    together = Recipes(*(np.concatenate([getattr(r, f) for r in recipes]) for f in ("ops", "magnitudes", "boxes")))
    flips = np.full(len(images) * len(GEOMETRY), flip)
    ours = execute(images * len(GEOMETRY), Policy(fill=77), together, flips)
    ours = ours.reshape(len(GEOMETRY), len(images), *images[0].shape)
    mirrored = [image[:, ::-1] if flip else image for image in images]  # torchvision flips first, the graph last
    for (op, m, share), found in zip(GEOMETRY, ours):
        differ = (found != expected(mirrored, torchvisions(op, m, fill=77))).any(axis=-1)
        assert differ.mean() <= share, (op.name, m, differ.mean())


def test_bilinear_sampling_equals_torchvisions_inside() -> None:
    images = drawn()
    for op, m in ((Op.ROTATE, 17.0), (Op.SHEAR_X, 0.2)):
        ours = execute(images, Policy(interpolation="bilinear"), recipe((op, m), count=len(images)))
        theirs = expected(images, torchvisions(op, m, bilinear=True))
        inside = (slice(None), slice(24, -24), slice(24, -24))  # at the edge PIL fades to the fill, DALI over a pixel
        delta = abs(ours[inside].astype(float) - theirs[inside])
        assert delta.mean() < 0.6 and delta.max() <= 2, (op.name, delta.mean(), delta.max())


def test_layers_follow_one_another() -> None:
    images = drawn()
    chain = [(Op.ROTATE, 20.0), (Op.SOLARIZE, 100), (Op.SHEAR_Y, -0.21), (Op.POSTERIZE, 3)]
    ours = execute(images, Policy(), recipe(*chain, count=len(images)), np.ones(len(images), bool))
    functions = [torchvisions(op, m) for op, m in chain]
    theirs = expected([image[:, ::-1] for image in images], v2.Compose(functions))
    assert (ours != theirs).mean() < 0.005


def test_drawn_recipes_run_through_every_branch_that_their_options_can_reach() -> None:
    """Real options, built as the trainer builds them: mixed batches, all policies, jitter and erasing at once."""
    images = drawn(64) * 8
    epochs, rows = np.zeros(len(images), int), np.arange(len(images))
    for options in (
        Policy(policy="randaugment", num_ops=2, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, erase=0.5),
        Policy(policy="randaugment", convention="timm", magnitude=7, magnitude_std=0.5),
        Policy(policy="autoaugment"),
        Policy(policy="trivialaugment"),
    ):
        recipes = policies.draw(options, 64, 0, epochs, rows)
        for layer, possible in enumerate(policies.layers(options)):
            assert set(recipes.ops[:, layer]) <= set(possible)
        flips = rows % 2 == 0
        ours = execute(images, options, recipes, flips)
        assert ours.shape == (len(images), 64, 64, 3)
        # The same image alone gives the same pixels: no neighbour has a say.
        alone = Recipes(recipes.ops[5:6], recipes.magnitudes[5:6], recipes.boxes[5:6])
        assert (execute(images[5:6], options, alone, flips[5:6])[0] == ours[5]).all()


def test_erasing_equals_torchvisions_on_the_normalised_image() -> None:
    images = drawn()
    boxes = np.array([[0, 0, 10, 20], [90, 60, 6, 36], [30, 40, 1, 1], [0, 0, 0, 0], [5, 6, 80, 7], [0, 0, 0, 0]])
    recipes = Recipes(np.zeros((6, 0), np.int32), np.zeros((6, 0), np.float32), boxes.astype(np.int32))
    flips = np.array([False, True] * 3)
    ours = torch.from_numpy(execute(images, Policy(erase=1.0), recipes, flips)).permute(0, 3, 1, 2)
    for image, (y, x, h, w), flip, found in zip(images, boxes.tolist(), flips, ours):
        tensor = torch.from_numpy(image[:, ::-1].copy() if flip else image).permute(2, 0, 1).float()
        theirs = F.erase(F.normalize(tensor, list(MEAN), list(STD)), y, x, h, w, v=torch.zeros(3, 1, 1))
        assert (found[:, y : y + h, x : x + w] == 0).all()
        assert torch.allclose(found, theirs, atol=1e-5)


def test_what_is_off_is_not_built() -> None:
    assert ops.steps(Policy()) == ops.Steps() and ops.steps(Policy()).inputs == 0
    assert ops.feed(ops.Steps(), recipe((Op.ROTATE, 5), count=1), np.zeros(1, bool), 8) == ()
    steps = ops.steps(Policy(brightness=0.4, erase=0.25, interpolation="bilinear", fill=3))
    assert steps == ops.Steps(layers=((Op.BRIGHTNESS,),), erase=True, bilinear=True, fill=3) and steps.inputs == 3
