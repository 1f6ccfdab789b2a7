"""The options of augmentation: the sections `augment` and `mix` of trainer/config.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from trainer.mistakes import ConfigError, at_least, one_of, pair, share

FULL_MAGNITUDE = {"torchvision": 30, "timm": 10}  # magnitude at which an operation has its full reach


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What is done to the pixels of a crop: all off by default. Part of the section `augment`."""

    policy: str = "none"  # none | randaugment | trivialaugment (wide) | autoaugment (ImageNet's policy)
    convention: str = "torchvision"  # torchvision | timm: whose operations, strengths and probability, for randaugment
    num_ops: int = 2  # operations one after another, for randaugment
    magnitude: float = 9  # of 30 (torchvision's 31 bins) or of 10 (timm), for randaugment
    magnitude_std: float = 0.0  # of a normal noise on it; .inf: uniform between 0 and magnitude
    increasing: bool = True  # timm's inc1: a higher magnitude is always a stronger change
    op_chance: float | None = None  # probability of each operation; None: 1 (torchvision) or 0.5 (timm)
    interpolation: str = "nearest"  # nearest | bilinear, of shear, translation and rotation
    fill: int = 0  # grey level of what they pull in from outside the image
    brightness: float = 0.0  # colour jitter: factors in 1 +- this, in an order drawn anew for each image
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # share of a turn, up to 0.5
    erase: float = 0.0  # probability of erasing a rectangle (with the mean colour: zeros after normalising)
    erase_scale: list[float] = field(default_factory=lambda: [0.02, 0.33])  # share of the area
    erase_ratio: list[float] = field(default_factory=lambda: [0.3, 3.3])  # height / width
    start_strength: float = 1.0  # share of magnitude, jitter and erase at the beginning; rises to 1 over data.ramp

    def __post_init__(self) -> None:
        for key, valid in (
            ("policy", ("none", "randaugment", "trivialaugment", "autoaugment")),
            ("convention", ("torchvision", "timm")),
            ("interpolation", ("nearest", "bilinear")),
        ):
            if getattr(self, key) not in valid:
                raise ConfigError(f"augment.{key}={getattr(self, key)} is not known; use one of: {', '.join(valid)}")
        top = FULL_MAGNITUDE[self.convention]
        for key, low, high in (
            ("num_ops", 1, 16),
            ("magnitude", 0, top),
            ("magnitude_std", 0, math.inf),
            ("op_chance", 0, 1),
            ("fill", 0, 255),
            ("brightness", 0, math.inf),
            ("contrast", 0, math.inf),
            ("saturation", 0, math.inf),
            ("hue", 0, 0.5),
            ("erase", 0, 1),
            ("start_strength", 1e-3, 1),
        ):
            value = getattr(self, key)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"augment.{key}={value} must lie between {low} and {high}")
        for key, top in (("erase_scale", 1.0), ("erase_ratio", math.inf)):
            value = getattr(self, key)
            if len(value) != 2 or not 0 < value[0] <= value[1] <= top:
                raise ConfigError(f"augment.{key}={value} is not a range; write two numbers above 0, the smaller first")


@dataclass(frozen=True, kw_only=True)
class Augment(Policy):
    """How a training image is cropped and flipped, and what is done to its pixels then."""

    crop: str = "resized"  # resized (RandomResizedCrop) | padded (zero padding, then a random crop: CIFAR) | center
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # share of the area, for crop=resized
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])  # width / height, for crop=resized
    padding: int = 4  # pixels on each side, for crop=padded
    flip: float = 0.5  # probability of a horizontal flip
    alternate_flip: bool = False  # flip drawn once a sample, then turned over each epoch (Jordan, arXiv:2404.00498)
    colout: float = 0.0  # share of rows and of columns left out of a step's images (ColOut, MosaicML); 0: none
    repeats: int = 1  # repeated augmentation: how often a sample stands in a step's batch, each time augmented anew

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("augment.crop", self.crop, ("resized", "padded", "center"))
        pair("augment.scale", self.scale)
        if self.scale[1] > 1:
            raise ConfigError(f"augment.scale={self.scale} is more than the whole image; it must end at 1 or below")
        pair("augment.ratio", self.ratio)
        at_least("augment.padding", self.padding, 0)
        share("augment.flip", self.flip)
        if not 0 <= self.colout <= 0.5:
            raise ConfigError(f"augment.colout={self.colout} must lie between 0 and 0.5: it is what is left out")
        at_least("augment.repeats", self.repeats, 1)


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Mixup and CutMix: both off by default."""

    mixup: float = 0.0  # alpha of Beta(alpha, alpha), from which the share of the first image is drawn; 0: off
    cutmix: float = 0.0  # the same for CutMix; 0: off
    cutmix_share: float = 0.5  # where both are on: how often it is CutMix
    chance: float = 1.0  # probability of mixing at all
    off_epoch: float | None = None  # from here on nothing is mixed, in epochs before schedule.scale; None: to the end
    group: int = 2  # neighbours in the global batch that share one draw; 0: the whole global batch

    def __post_init__(self) -> None:
        for key, low, high in (("mixup", 0, 10), ("cutmix", 0, 10), ("cutmix_share", 0, 1), ("chance", 0, 1)):
            value = getattr(self, key)
            if not low <= value <= high:
                raise ConfigError(f"mix.{key}={value} must lie between {low} and {high}")
        at_least("mix.off_epoch", self.off_epoch, 0)
        if self.group < 0 or self.group % 2:
            raise ConfigError(f"mix.group={self.group} must be even, as pairs are mixed; 0 is the whole global batch")

    @property
    def on(self) -> bool:
        """Whether anything is mixed at all."""
        return (self.mixup > 0 or self.cutmix > 0) and self.chance > 0
