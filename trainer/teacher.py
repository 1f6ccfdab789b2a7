"""Distillation: another network whose answers ours is drawn towards (Hinton et al., arXiv:1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from trainer import losses
from trainer.config import Config, ConfigError, Loss, Model
from trainer.models import build


@dataclass(frozen=True)
class Teacher:
    """A network that does not learn, and how much it counts."""

    model: nn.Module
    options: Loss

    def blended(self, loss: torch.Tensor, logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """`loss` to the labels and the distance to the teacher's answer for the same images, by their shares."""
        with torch.no_grad():
            answer = self.model(images).to(logits.dtype)
        distance = losses.distance(logits, answer, self.options.temperature)
        return torch.lerp(loss, distance, self.options.teacher_share)


def create(config: Config, classes: int, device: torch.device) -> Teacher | None:
    """The teacher that `loss.teacher` names, on its device, None where there is none; ConfigError if it is not fit."""
    options = config.loss
    if options.teacher is None or options.teacher_weights is None:
        return None
    try:
        model = build.create(Model(name=options.teacher), classes)
    except ConfigError as error:
        raise ConfigError(f"loss.teacher: {error}") from error
    build.load_weights(model, options.teacher_weights, key="loss.teacher_weights")
    layout = torch.channels_last if config.precision.channels_last else torch.contiguous_format
    return Teacher(model.to(device, memory_format=layout).eval().requires_grad_(False), options)
