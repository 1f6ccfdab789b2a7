"""The weights that timm and torchvision publish: what images they want, what their classes are, and how to get them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from trainer.config import ConfigError, Model
from trainer.models import build


@dataclass(frozen=True, kw_only=True)
class About:
    """What a library says of weights."""

    size: int  # side of the evaluation crop in pixels
    crop_ratio: float  # of it to the short side after the resize
    mean: list[float]  # RGB in [0, 1]
    std: list[float]
    classes: int
    names: tuple[str, ...] | None  # wnids of ImageNet-1k, None for any other set


def split(text: str) -> tuple[str, str]:
    """(model.name, tag) of NAME, timm:NAME.TAG or torchvision:NAME.TAG; a timm name keeps its tag."""
    library, _, name = text.partition(":")
    if library != "torchvision":
        return text, ""
    name, _, tag = name.partition(".")
    return f"{library}:{name}", tag


def about(name: str, tag: str) -> About | None:
    """What the library says of the weights of `name`, as `split` returns it; None where it has none."""
    library, _, bare = name.partition(":")
    if library == "timm":
        return _timms(bare)
    return _torchvisions(bare, tag) if library == "torchvision" else None


def wnids() -> tuple[str, ...]:
    """The classes of ImageNet-1k in the order of everybody's labels."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo().label_names())


def create(options: Model, tag: str) -> nn.Module:
    """The network with the library's own weights, from its cache or the network; ConfigError if it is in neither.

    Weights of other classes than `options.num_classes` are refused: a new head would say nothing.
    """
    library, _, name = options.name.partition(":")
    found = about(options.name, tag)
    if found is None:
        raise ConfigError(f"model.name={options.name} has no published weights: give model.weights=FILE")
    if options.num_classes not in (None, found.classes):
        raise ConfigError(
            f"model.num_classes={options.num_classes}: the weights of {options.name} are for {found.classes} classes; "
            "leave it out"
        )
    model = build.create(replace(options, num_classes=None), found.classes)
    try:
        if library == "timm":
            from timm.models import load_pretrained

            load_pretrained(model, num_classes=found.classes)
        else:
            model.load_state_dict(_enum(name, tag).get_state_dict(progress=False, check_hash=True))
    except Exception as error:  # of urllib, httpx, huggingface_hub or torch, each with classes of its own
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ConfigError(
            f"the weights of {options.name} cannot be fetched ({reason}): check the network, or give them as "
            "model.weights=FILE"
        ) from error
    return model


def _timms(name: str) -> About | None:
    import timm
    from timm.data import resolve_data_config

    if not timm.is_model(name):
        return None  # build.create says so
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:  # a tag that does not exist
        raise ConfigError(f"model.name=timm:{name} has no such weights: {' '.join(str(error).split())}") from error
    if config is None or not (config.hf_hub_id or config.url or config.file):
        return None
    data = resolve_data_config(pretrained_cfg=config.to_dict(), use_test_size=True)
    return About(
        size=data["input_size"][-1],
        crop_ratio=data["crop_pct"],
        mean=list(data["mean"]),
        std=list(data["std"]),
        classes=config.num_classes,
        names=wnids() if config.num_classes == 1000 else None,
    )


def _torchvisions(name: str, tag: str) -> About | None:
    from torchvision import models

    if name not in models.list_models(module=models):
        return None  # build.create says so
    found = _enum(name, tag)
    made = found.transforms()
    classes = len(found.meta["categories"])
    return About(
        size=made.crop_size[0],
        crop_ratio=made.crop_size[0] / made.resize_size[0],
        mean=list(made.mean),
        std=list(made.std),
        classes=classes,
        names=wnids() if classes == 1000 else None,
    )


def _enum(name: str, tag: str):
    """torchvision's entry of one set of weights; without a tag, of those it recommends."""
    from torchvision import models

    known = models.get_model_weights(name)
    if not tag:
        return known.DEFAULT
    if tag not in known.__members__:
        raise ConfigError(f"torchvision:{name} has no weights {tag}: use one of {', '.join(known.__members__)}")
    return known[tag]
