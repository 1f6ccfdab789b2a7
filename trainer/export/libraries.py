"""Whose networks load our state dicts as they are, with the same logits: timm's, torchvision's, and always our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from trainer.config import Model
from trainer.models.resnet import CIFAR, FAMILY, BasicBlock
from trainer.target import find


@dataclass(frozen=True, kw_only=True)
class Library:
    """A library's network of the same layers under the same names."""

    name: str
    network: str  # its name there
    load: Callable[[Path], nn.Module]  # strictly
    lines: tuple[str, ...]  # of Python, for FILE


def libraries(options: Model, classes: int) -> list[Library]:
    """Those whose network `options` describe, the first the one to recommend; ours comes last."""
    timm, torchvision = _names(options)
    found = []
    if timm:
        found.append(_timm(timm, classes))
    if torchvision:
        found.append(_torchvision(torchvision, classes))
    lines = ("from trainer.target import find", 'target = find("FILE", [])', "model = target.model()")
    return [*found, Library(name="trainer", network=options.name, load=lambda p: find(str(p), []).model(), lines=lines)]


def _names(options: Model) -> tuple[str | None, str | None]:
    """(timm's name, torchvision's name); None where it has no such network."""
    library, _, name = options.name.partition(":")
    if options.blurpool != "none":
        return None, None  # its layers have no weights, so that a state dict would load and compute something else
    if name:
        return (name.partition(".")[0], None) if library == "timm" else (None, name)
    if options.name in CIFAR or not options.residual or options.shortcut not in (None, "B"):
        return None, None
    if options.variant == "d":
        return f"{options.name}d", None
    if options.variant == "v1" and FAMILY[options.name][0] is not BasicBlock:
        return None, None  # the stride is elsewhere, and the names are the same
    return options.name, options.name


def _timm(name: str, classes: int) -> Library:
    def load(path: Path) -> nn.Module:
        import timm
        from safetensors.torch import load_file

        model = timm.create_model(name, num_classes=classes)
        model.load_state_dict(load_file(path))
        return model

    lines = (
        "import timm, safetensors.torch",
        f'model = timm.create_model("{name}", num_classes={classes}).eval()',
        'model.load_state_dict(safetensors.torch.load_file("FILE"))',
    )
    return Library(name="timm", network=name, load=load, lines=lines)


def _torchvision(name: str, classes: int) -> Library:
    # The networks with a second head for training are built without it here.
    extra = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}

    def load(path: Path) -> nn.Module:
        from safetensors.torch import load_file
        from torchvision import models

        model = models.get_model(name, num_classes=classes, **extra)
        model.load_state_dict(load_file(path))
        return model

    given = "".join(f", {key}={value}" for key, value in extra.items())
    lines = (
        "import safetensors.torch, torchvision",
        f'model = torchvision.models.get_model("{name}", num_classes={classes}{given}).eval()',
        'model.load_state_dict(safetensors.torch.load_file("FILE"))',
    )
    return Library(name="torchvision", network=name, load=load, lines=lines)
