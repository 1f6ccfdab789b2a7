"""The command `describe`: what a network consists of, at the size of image that it is meant for."""

from __future__ import annotations

import torch
from torch import nn

from trainer import configfile
from trainer.config import ConfigError
from trainer.models import build
from trainer.models.resnet import CIFAR
from trainer.models.stages import format_stages, stages
from trainer.models.summary import format_table, layer_table


def describe(words: list[str], *, layers: bool = False) -> str:
    """The network that `key=value` words choose, as a table by stage or by layer; nothing of it is computed.

    data.image_size and model.num_classes, where they are not given, are those the network was published with. Raises
    ConfigError for a network that cannot be built, or takes no images of that size.
    """
    config = configfile.load(None, words)
    small = config.model.name in CIFAR
    classes = config.model.num_classes or (10 if small else 1000)
    with torch.device("meta"):
        model = build.create(config.model, classes)
    size = config.data.image_size if any(w.startswith("data.image_size=") for w in words) else _own_size(model, small)
    try:
        table = format_table(layer_table(model, size)) if layers else format_stages(stages(model, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"data.image_size={size} does not fit model.name={config.model.name} ({reason}): "
            "choose another size or network"
        ) from error
    head = f"{config.model.name}, {size} x {size} pixels, {classes} classes; all but parameters for one image"
    foot = "FLOPs are two a multiply-accumulate (MAC); activations are what training keeps, in fp32"
    return "\n".join([head, table] if layers else [head, table, foot])


def _own_size(model: nn.Module, small: bool) -> int:
    """Side in pixels: what timm says, CIFAR's for the CIFAR nets, else ImageNet's usual one."""
    found = getattr(model, "pretrained_cfg", None) or {}
    return found["input_size"][-1] if found.get("input_size") else 32 if small else 224
