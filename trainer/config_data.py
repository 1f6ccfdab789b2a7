"""The options of the section `data` of trainer/config.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.mistakes import ConfigError, at_least, one_of, share


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the images come from, and the shape they reach the network in."""

    root: str = "data/imagenet"  # folder that holds the two folders below
    train: str = "train"  # folder of class folders, below root; "." is root itself
    val: str | None = None  # None: the first of val, validation, test that exists
    source: str = "dali"  # dali | torchvision (Pillow in processes: slower) | synthetic (random tensors, made once)
    decoder: str = "auto"  # auto (where the training runs) | cpu | gpu
    image_size: int = 224  # side of the training crop in pixels
    start_size: int | None = None  # side at the beginning, for progressive resizing; None: image_size throughout
    ramp: list[float] = field(default_factory=lambda: [0.4, 0.8])  # share of the epochs over which it rises, linearly
    size_step: int = 32  # sides between the two are multiples of this
    eval_size: int | None = None  # side of the evaluation crop; None: image_size
    eval_resize: int | None = None  # short side before the evaluation crop; None: eval_size * 256 / 224; 0: no resize
    threads: int | None = None  # of a rank, to decode (torchvision: processes); None: its share of the cores, at most 8
    prefetch: int = 2  # batches decoded ahead
    on_error: str = "stop"  # stop | skip: what an image that cannot be decoded does, met in mid-run
    max_skipped: float = 0.001  # share of the images that may be skipped before the run stops
    stage_to: str | None = None  # folder on the node's own disk or in its memory (/dev/shm) to copy the set to first
    stage_reserve_gb: float = 5.0  # 10^9 bytes that staging leaves free there
    hw_decoder_load: float | None = None  # share of the images for a GPU's JPEG hardware; None: DALI's choice (0.65)
    decode_pixels: int | None = None  # GPU decoders get buffers for images of this many pixels at once; None: they grow
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])  # ImageNet's, RGB in [0, 1]
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    synthetic_samples: int = 1_281_167  # ImageNet's; only for source=synthetic
    synthetic_classes: int = 1000

    def __post_init__(self) -> None:
        one_of("data.source", self.source, ("dali", "torchvision", "synthetic"))
        one_of("data.decoder", self.decoder, ("auto", "cpu", "gpu"))
        if self.decoder == "gpu" and self.source == "torchvision":
            raise ConfigError("data.decoder=gpu needs data.source=dali: torchvision decodes on the CPU")
        one_of("data.on_error", self.on_error, ("stop", "skip"))
        share("data.max_skipped", self.max_skipped)
        for key in (
            "image_size",
            "start_size",
            "size_step",
            "eval_size",
            "threads",
            "prefetch",
            "synthetic_samples",
            "synthetic_classes",
        ):
            at_least(f"data.{key}", getattr(self, key), 1)
        at_least("data.eval_resize", self.eval_resize, 0)
        if self.start_size is not None and self.start_size > self.image_size:
            raise ConfigError(f"data.start_size={self.start_size} is more than data.image_size={self.image_size}")
        if len(self.ramp) != 2 or not 0 <= self.ramp[0] <= self.ramp[1] <= 1:
            raise ConfigError(f"data.ramp={self.ramp} must be two shares of the run, the earlier first, as [0.4, 0.8]")
        at_least("data.stage_reserve_gb", self.stage_reserve_gb, 0)
        at_least("data.decode_pixels", self.decode_pixels, 1)
        if self.hw_decoder_load is not None:
            share("data.hw_decoder_load", self.hw_decoder_load)
        if self.eval_resize and self.eval_resize < self.crop_size:
            raise ConfigError(
                f"data.eval_resize={self.eval_resize} is smaller than the evaluation crop of {self.crop_size} px: "
                "raise data.eval_resize or lower data.eval_size"
            )
        for key, value in (("data.mean", self.mean), ("data.std", self.std)):
            if len(value) != 3 or min(value) < 0 or (key == "data.std" and min(value) == 0):
                raise ConfigError(f"{key}={value} must be three numbers, one a colour channel, in units of [0, 1]")

    @property
    def crop_size(self) -> int:
        """Side of the evaluation crop in pixels."""
        return self.image_size if self.eval_size is None else self.eval_size

    @property
    def short_side(self) -> int:
        """Short side in pixels that an evaluation image is resized to before its crop; 0: it is not resized."""
        return round(self.crop_size * 256 / 224) if self.eval_resize is None else self.eval_resize
