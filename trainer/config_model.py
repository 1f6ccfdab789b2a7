"""The options of the network: the section `model` of trainer/config.py."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.mistakes import ConfigError, at_least, one_of


@dataclass(frozen=True, kw_only=True)
class Model:
    """The network. `timm:NAME` and `torchvision:NAME` build theirs."""

    name: str = "resnet50"
    num_classes: int | None = None  # None: as many as the data set has
    variant: str = "v1.5"  # v1.5 (stride on the 3x3) | v1 (on the first 1x1) | d (deep stem, average-pooled shortcut)
    residual: bool = True  # False: the plain network of the ResNet paper
    shortcut: str | None = None  # A | B | C of the paper; None: B for the ImageNet nets, A for the CIFAR nets
    zero_init_residual: bool = False  # last gamma of each block starts at 0
    conv_init: str = "fan_out"  # fan_out (torchvision) | fan_in (NVIDIA ConvNets)
    drop_rate: float = 0.0  # dropout before the head
    drop_path_rate: float = 0.0  # stochastic depth of the last block, linear in depth
    blurpool: str = (
        "none"  # none | convs (blur before each strided convolution: FFCV) | all (after pooling too: Mosaic)
    )
    norm_init: str = "ones"  # ones | uniform (gammas drawn from [0, 1]: Mosaic)
    head_prior: bool = False  # the head's bias starts at -log(classes): as sure as guessing, for loss.name=bce
    weights: str | None = None  # start from this file: a state dict or a checkpoint
    new_head: bool = False  # take all of `weights` but the head: to fine-tune on other classes

    def __post_init__(self) -> None:
        at_least("model.num_classes", self.num_classes, 1)
        one_of("model.variant", self.variant, ("v1.5", "v1", "d"))
        one_of("model.shortcut", self.shortcut, (None, "A", "B", "C"))
        one_of("model.conv_init", self.conv_init, ("fan_out", "fan_in"))
        one_of("model.blurpool", self.blurpool, ("none", "convs", "all"))
        one_of("model.norm_init", self.norm_init, ("ones", "uniform"))
        if self.new_head and self.weights is None:
            raise ConfigError("model.new_head=true needs model.weights: without a file every layer is new")
        for key in ("drop_rate", "drop_path_rate"):
            value = getattr(self, key)
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"model.{key}={value} must be at least 0 and below 1")
