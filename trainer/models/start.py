"""Where training starts: the head of a network, and the initial values that options change."""

from __future__ import annotations

import math

import torch
from torch import nn

from trainer.config import ConfigError, Model
from trainer.models.resnet import ResNet


def head(model: nn.Module) -> nn.Module:
    """The layer that gives the logits: as timm says, else the last that is linear or a convolution."""
    if hasattr(model, "get_classifier"):
        return model.get_classifier()
    return [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]


def set_start(options: Model, model: nn.Module, classes: int) -> None:
    """Set gammas and the head's bias of a new network as `options` ask; ConfigError if it has no such thing."""
    if options.norm_init == "uniform":
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.weight)
    if options.head_prior:
        bias = getattr(head(model), "bias", None)
        if bias is None:
            raise ConfigError(f"model.head_prior=true: the head of model.name={options.name} has no bias; leave it out")
        nn.init.constant_(bias, -math.log(classes))


def check_sizes(options: Model, model: nn.Module, sizes: dict[str, int]) -> None:
    """ConfigError, naming the key, if `model`, on the CPU, cannot take images of one of `sizes` (key: side in pixels).

    Our own networks say their stride; others are asked with one image, which a ViT of another size refuses.
    """
    for key, size in sizes.items():
        if isinstance(model, ResNet):
            reason = f"its stride is {model.stride}" if size < model.stride else None
        else:
            reason = _refusal(model, size)
        if reason:
            raise ConfigError(
                f"{key}={size} does not fit model.name={options.name} ({reason}): choose another size or network"
            )


@torch.inference_mode()
def _refusal(model: nn.Module, size: int) -> str | None:
    """What `model` says against an image of size x size pixels."""
    training = model.training
    try:
        model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    finally:
        model.train(training)
    return None
