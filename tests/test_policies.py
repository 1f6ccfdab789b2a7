"""What is drawn for an image: torchvision's and timm's operations, strengths and rates, by (seed, sample) alone."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.data import auto_augment as timm_augment
from torchvision.transforms import v2

from trainer.config import ConfigError
from trainer.data.philox import AUGMENT_OPS, uniforms
from trainer.data.policies import Op, Policy, Recipes, draw, layers

SIZE = 224
EVERYTHING = Policy(
    policy="randaugment", magnitude_std=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, erase=0.5
)
# torchvision's and timm's names of our operations; the other direction of an enhancement is the same operation.
NAMES = {
    **{op.name.replace("_", "").lower(): op for op in Op},
    "translatexrel": Op.TRANSLATE_X,
    "translateyrel": Op.TRANSLATE_Y,
}
SIGNED = {*list(Op)[Op.SHEAR_X : Op.POSTERIZE]}


def drawn(options: Policy, count: int = 20_000, seed: int = 0) -> Recipes:
    return draw(options, SIZE, seed, np.zeros(count, int), np.arange(count))


def neutral(op: Op) -> float:
    return 1.0 if Op.BRIGHTNESS <= op <= Op.SHARPNESS else 0.0


def torchvisions(transform: type, only: int | None = None) -> dict[Op, set[float]]:
    """Each operation's arguments in torchvision's class, at every bin or at one, in the unit of our magnitudes."""
    found = {}
    for name, (magnitudes, signed) in transform._AUGMENTATION_SPACE.items():
        op, values = NAMES[name.lower()], magnitudes(31, SIZE, SIZE)
        arguments = {0.0}
        if values is not None:
            bins = values if only is None else values[only : only + 1]
            arguments = {s * float(v) for v in bins for s in ((-1, 1) if signed else (1,))}
        if op in (Op.TRANSLATE_X, Op.TRANSLATE_Y):
            # The slack is for bin 15 of 32 pixels: 16, but 15.999999 and hence 15 in torchvision's float32 linspace.
            arguments = {float(np.trunc(v + np.sign(v) * 1e-4)) for v in arguments}
        if op == Op.SOLARIZE:
            arguments = {float(np.ceil(255 * v - 1e-3)) for v in arguments}
        found[op] = {neutral(op) + v for v in arguments}
    return found


def near(values: np.ndarray, allowed: set[float]) -> bool:
    table = np.array(sorted(allowed))
    return bool((abs(values[:, None] - table).min(axis=1) < 1e-4).all())


def frequencies(ops: np.ndarray) -> np.ndarray:
    return np.bincount(ops.ravel(), minlength=len(Op)) / ops.size


def test_the_same_sample_draws_the_same_wherever_it_stands() -> None:
    whole = drawn(EVERYTHING, 500)
    for rows in (np.array([77]), np.array([3, 77, 499]), np.array([77, 77])):
        part = draw(EVERYTHING, SIZE, 0, np.zeros(len(rows), int), rows)
        for name in ("ops", "magnitudes", "boxes"):
            assert (getattr(part, name) == getattr(whole, name)[rows]).all(), name


@pytest.mark.parametrize("change", [{"seed": 1}, {"epochs": 1}, {"rows": 10_000}, {"repeats": 1}])
def test_every_coordinate_matters(change: dict) -> None:
    count = 500
    place = {"seed": 0, "epochs": 0, "rows": 0, "repeats": 0} | change
    epochs, rows = np.full(count, place["epochs"]), np.arange(count) + place["rows"]
    other, base = draw(EVERYTHING, SIZE, place["seed"], epochs, rows, place["repeats"]), drawn(EVERYTHING, count)
    assert (other.ops != base.ops).mean() > 0.5
    assert (other.magnitudes != base.magnitudes).mean() > 0.5
    assert (other.boxes != base.boxes).any(axis=1).mean() > 0.5


def test_no_option_moves_the_draws_of_another() -> None:
    base = drawn(EVERYTHING, 500)
    deeper = drawn(replace(EVERYTHING, num_ops=5), 500)
    assert (deeper.ops[:, :2] == base.ops[:, :2]).all() and (deeper.ops[:, 5:] == base.ops[:, 2:]).all()
    assert (deeper.boxes == base.boxes).all() and (deeper.magnitudes[:, 5:] == base.magnitudes[:, 2:]).all()
    alone = drawn(Policy(erase=0.5), 500)
    assert (alone.boxes == base.boxes).all() and alone.ops.shape == (500, 0)


def test_crop_windows_and_operations_share_no_numbers() -> None:
    """The crop's numbers come from another key: correlated, a strong rotation would always meet the same crop."""
    epochs, rows = np.zeros(4000, int), np.arange(4000)
    windows = uniforms(0, epochs, rows, 32)
    angle = drawn(Policy(hue=0.5), 4000).magnitudes[:, 0]
    assert AUGMENT_OPS not in (1, 2)
    assert max(abs(np.corrcoef(angle, column)[0, 1]) for column in windows.T) < 0.08


def test_randaugment_is_torchvisions() -> None:
    for magnitude in (0, 5, 9, 30):
        found = drawn(Policy(policy="randaugment", magnitude=magnitude, num_ops=3), 4000)
        space = torchvisions(v2.RandAugment, only=magnitude)
        for op in Op:
            here = found.magnitudes[found.ops == op]
            assert (len(here) > 0) == (op in space), op.name
            assert op not in space or near(here, space[op]), (op.name, np.unique(here), space[op])


def test_trivialaugment_takes_every_bin_of_torchvisions_wide_space() -> None:
    found, space = drawn(Policy(policy="trivialaugment"), 60_000), torchvisions(v2.TrivialAugmentWide)
    for op, allowed in space.items():
        here = found.magnitudes[found.ops == op]
        assert near(here, allowed), op.name
        assert len(np.unique(here)) == len(np.unique(np.float32(list(allowed)))), (op.name, "every bin occurs")
    assert set(np.unique(found.ops)) == {int(op) for op in space}


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_operations_and_signs_are_equally_frequent(policy: str) -> None:
    found = drawn(Policy(policy=policy), 40_000)
    shares = frequencies(found.ops)
    assert abs(shares[shares > 0] - 1 / 14).max() < 0.005 and (shares > 0).sum() == 14
    for op in SIGNED:
        strength = found.magnitudes[found.ops == op] - neutral(op)
        strength = strength[strength != 0]
        assert abs((strength < 0).mean() - 0.5) < 0.04, op.name


def test_layers_of_one_image_are_independent() -> None:
    found = drawn(Policy(policy="randaugment"), 40_000)
    assert abs((found.ops[:, 0] == found.ops[:, 1]).mean() - 1 / 14) < 0.005
    assert abs((found.ops[1:, 0] == found.ops[:-1, 0]).mean() - 1 / 14) < 0.005


def test_autoaugment_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's own class, run 15,000 times with its operations only noted down."""
    noted: list[tuple[Op, float]] = []

    def note(self, image, name, magnitude, **_):
        noted.append((NAMES[name.lower()], magnitude))
        return image

    monkeypatch.setattr(v2.AutoAugment, "_apply_image_or_video_transform", note)
    torch.manual_seed(0)
    transform, image, count = v2.AutoAugment(), torch.zeros(3, SIZE, SIZE, dtype=torch.uint8), 15_000
    applied = []
    for _ in range(count):
        before = len(noted)
        transform(image)
        applied.append(len(noted) - before)
    theirs = np.bincount([op for op, _ in noted], minlength=len(Op)) / count
    found = drawn(Policy(policy="autoaugment"), 40_000)
    ours = frequencies(found.ops) * 2
    assert abs(ours - theirs)[1:].max() < 0.015
    # 0, 1 or 2 of a sub-policy's operations: each has its own chance, independent of the other's.
    both = np.bincount((found.ops > 0).sum(axis=1), minlength=3) / len(found.ops)
    assert abs(both - np.bincount(applied, minlength=3) / count).max() < 0.015
    for op in {op for op, _ in noted}:
        exact = np.float32([m for o, m in noted if o == op])
        exact = np.ceil(255 * exact - 1e-3) if op == Op.SOLARIZE else exact + neutral(op)
        values, counts = np.unique(found.magnitudes[found.ops == op].round(4), return_counts=True)
        expected, theirs_counts = np.unique(exact.round(4), return_counts=True)
        assert np.allclose(values, expected, atol=2e-4), op.name
        slack = 3 / np.sqrt(theirs_counts.sum())  # over 5 standard deviations of torchvision's own sample
        assert abs(counts / counts.sum() - theirs_counts / theirs_counts.sum()).max() < slack, op.name


@pytest.mark.parametrize("increasing", [True, False])
def test_randaugment_in_timms_convention_is_timms(increasing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's own transform, run 20,000 times with its operations only noted down."""
    noted: list[tuple[Op, float]] = []
    for name in timm_augment.NAME_TO_OP:
        op = NAMES.get(name.lower().removesuffix("increasing"))

        def note(image, *arguments, op=op, **_):
            noted.append((op, *(arguments or (0.0,))))
            return image

        monkeypatch.setitem(timm_augment.NAME_TO_OP, name, note)
    random.seed(0)
    np.random.seed(0)
    count = 10_000
    transform = timm_augment.rand_augment_transform(f"rand-m7-mstd0.5-inc{int(increasing)}")
    for _ in range(count):
        transform(None)
    options = Policy(policy="randaugment", convention="timm", magnitude=7, magnitude_std=0.5, increasing=increasing)
    found = drawn(options, 40_000)
    theirs = np.bincount([op for op, _ in noted], minlength=len(Op)) / (2 * count)
    assert abs(frequencies(found.ops) - theirs)[1:].max() < 0.006, "each at 1/15 of a half"
    relative = {Op.TRANSLATE_X: SIZE, Op.TRANSLATE_Y: SIZE}  # timm's are shares of the side
    for op in {op for op, _ in noted}:
        here = found.magnitudes[found.ops == op]
        exact = np.array([m for o, m in noted if o == op]) * relative.get(op, 1)
        scale = max(abs(exact).max(), 1e-6)
        for q in (0.05, 0.3, 0.7, 0.95):
            assert abs(np.quantile(here, q) - np.quantile(exact, q)) / scale < 0.03, (op.name, q)


def test_noise_on_the_magnitude_is_normal_and_clipped_or_uniform() -> None:
    found = drawn(Policy(policy="randaugment", magnitude=9, magnitude_std=2.0), 80_000)
    level = abs(found.magnitudes[found.ops == Op.ROTATE])
    assert abs(level.mean() - 9) < 0.1 and abs(level.std() - 2) < 0.1
    found = drawn(Policy(policy="randaugment", convention="timm", magnitude=10, magnitude_std=1.0))
    level = abs(found.magnitudes[found.ops == Op.ROTATE]) / 3
    assert level.max() == 10 and abs((level == 10).mean() - 0.5) < 0.05
    found = drawn(Policy(policy="randaugment", magnitude=12, magnitude_std=float("inf")), 80_000)
    level = abs(found.magnitudes[found.ops == Op.ROTATE])
    assert level.max() <= 12 and abs(level.mean() - 6) < 0.2 and abs(level.std() - 12 / 12**0.5) < 0.1


def test_colour_jitter_is_torchvisions() -> None:
    options = Policy(brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1)
    found = drawn(options)
    assert (np.sort(found.ops, axis=1) == sorted([Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR, Op.HUE])).all()
    orders = np.unique(found.ops, axis=0, return_counts=True)[1] / len(found.ops)
    assert len(orders) == 24 and abs(orders - 1 / 24).max() < 0.006, "torchvision permutes the four"
    jitter = v2.ColorJitter(brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1)
    ranges = {
        Op.BRIGHTNESS: jitter.brightness, Op.CONTRAST: jitter.contrast, Op.COLOR: jitter.saturation, Op.HUE: jitter.hue
    }  # fmt: skip
    for op, (low, high) in ranges.items():
        here = found.magnitudes[found.ops == op]
        assert low - 1e-6 <= here.min() < low + 0.01 and high - 0.01 < here.max() <= high + 1e-6
        assert abs(here.mean() - (low + high) / 2) < 0.02 * (high - low)
    assert drawn(Policy(saturation=0.3), 10).ops.tolist() == [[Op.COLOR]] * 10


def test_erased_boxes_are_distributed_as_torchvisions() -> None:
    found = drawn(Policy(erase=0.25)).boxes
    erased = found[:, 2] > 0
    assert abs(erased.mean() - 0.25) < 0.02 and (found[~erased] == 0).all()
    ours = drawn(Policy(erase=1.0), 4000).boxes
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= SIZE).all()
    torch.manual_seed(0)
    transform = v2.RandomErasing(p=1.0)
    params = [transform.make_params([torch.empty(3, SIZE, SIZE)]) for _ in range(4000)]
    theirs = np.array([[p["i"], p["j"], p["h"], p["w"]] for p in params])
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert abs(np.quantile(ours, q, axis=0) - np.quantile(theirs, q, axis=0)).max() < 0.04 * SIZE, q
        for shape in (lambda box: np.log(box[:, 2] * box[:, 3]), lambda box: np.log(box[:, 2] / box[:, 3])):
            assert abs(np.quantile(shape(ours), q) - np.quantile(shape(theirs), q)) < 0.15, q


def test_a_box_that_never_fits_erases_nothing() -> None:
    assert (drawn(Policy(erase=1.0, erase_scale=[1.0, 1.0], erase_ratio=[1.0, 1.0]), 50).boxes == 0).all()


def test_layers_name_what_can_come_and_nothing_else() -> None:
    assert layers(Policy()) == () and drawn(Policy(), 5).ops.shape == (5, 0)
    for options in (
        EVERYTHING,
        Policy(policy="autoaugment", hue=0.1),
        Policy(policy="trivialaugment"),
        Policy(policy="randaugment", convention="timm"),
        Policy(policy="randaugment", op_chance=0.3),
    ):
        found, possible = drawn(options, 20_000).ops, layers(options)
        assert [set(np.unique(column)) for column in found.T] == [{int(op) for op in ops} for ops in possible]


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy": "augmix"}, {"convention": "jax"}, {"interpolation": "cubic"}, {"num_ops": 0}, {"magnitude": 31},
        {"magnitude": -1}, {"magnitude_std": -1}, {"op_chance": 2}, {"fill": 256}, {"brightness": -0.1},
        {"contrast": -1}, {"saturation": -1}, {"hue": 0.6}, {"erase": 1.1}, {"erase_scale": [0.5, 0.2]},
        {"erase_scale": [0.5, 1.2]}, {"erase_ratio": [0.0, 1.0]},
    ],
)  # fmt: skip
def test_impossible_options_name_their_key(wrong: dict) -> None:
    (key,) = wrong
    with pytest.raises(ConfigError, match=f"augment.{key}="):
        Policy(**wrong)
    with pytest.raises(ConfigError, match=r"augment\.magnitude=11"):
        Policy(convention="timm", magnitude=11)
