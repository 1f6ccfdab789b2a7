"""What a command is pointed at: a run, a checkpoint, an export, a config with weights, or a library's own weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer import checkpoint, configfile
from trainer.config import Config, ConfigError
from trainer.models import build, pretrained
from trainer.models.resnet import FAMILY

METADATA = "imagenet-trainer"  # the key of an exported safetensors file's metadata that holds ours, in JSON


@dataclass(frozen=True, kw_only=True)
class Target:
    """A network with weights, and how its images are to be made."""

    name: str  # for messages and records
    config: Config
    weights: Path | None = None  # None: the library's own
    tag: str = ""  # which of torchvision's own
    classes: tuple[str, ...] | None = None  # by label; None: nobody knows
    run: Path | None = None  # the run folder it comes from

    @property
    def has_ema(self) -> bool:
        return self.weights is not None and build.has_ema(self.weights)

    def model(self, classes: int | None = None, *, ema: bool = False) -> nn.Module:
        """The network on the CPU, with its weights, for evaluation; ConfigError where they are not to be had.

        Args:
            classes: how many there are where neither the config nor the weights say; None: 1000.
            ema: take the averaged weights of a checkpoint.
        """
        options = self.config.model
        count = options.num_classes or (len(self.classes) if self.classes else classes)
        if self.weights is None:
            return pretrained.create(options, self.tag).eval()
        model = build.create(options, count or 1000)
        build.load_weights(model, self.weights, ema=ema)
        return model.eval()


def find(text: str, overrides: list[str]) -> Target:
    """What `text` stands for, with `key=value` on top of its config; ConfigError if it is nothing of the kind.

    Args:
        text: a run folder (its newest checkpoint), a checkpoint folder, an exported .safetensors file, a CONFIG with
            model.weights, or the name of a network: ours with model.weights, timm:NAME[.TAG] or
            torchvision:NAME[.TAG], whose weights the library fetches where model.weights names none.
    """
    path = Path(text)
    if (path / "config.yaml").exists():
        newest = checkpoint.newest_whole(path / "checkpoints")
        if newest is None:
            raise ConfigError(f"{path} has no checkpoint yet: train it first")
        return _checkpoint(newest, path, overrides)
    if (path / "manifest.json").exists():
        checkpoint.verify(path)
        return _checkpoint(path, path.parent.parent, overrides)
    if path.is_dir():
        raise ConfigError(f"{path} is neither a run folder (config.yaml) nor a checkpoint (manifest.json)")
    if text in FAMILY or text.startswith(("timm:", "torchvision:")):
        return _named(text, overrides)
    if path.suffix == ".safetensors":
        return _exported(path, overrides)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{text} {'is of no known kind' if path.exists() else 'does not exist'}: {_KINDS}")
    config = configfile.load(path, overrides)
    if config.model.weights is None:
        raise ConfigError(f"{path} names no weights: add model.weights=FILE")
    weights = Path(config.model.weights)
    return Target(name=str(weights), config=config, weights=weights, classes=_classes(weights))


_KINDS = (
    "give a run folder, a checkpoint folder, an exported .safetensors file, a CONFIG.yaml with model.weights=FILE, "
    "timm:NAME or torchvision:NAME, or NAME model.weights=FILE"
)


def _checkpoint(path: Path, run: Path, overrides: list[str]) -> Target:
    config = configfile.load(run / "config.yaml", overrides)
    return Target(name=str(path), config=config, weights=path, classes=_classes(path), run=run)


def _classes(weights: Path) -> tuple[str, ...] | None:
    """The classes that one of our checkpoints or exports names; None of any other file."""
    if weights.suffix == ".safetensors":
        names = (read_metadata(weights) or {}).get("classes")
    elif (weights / "manifest.json").exists():
        names = checkpoint.load(weights).get("classes")
    else:
        names = None
    return tuple(names) if names else None


def _exported(path: Path, overrides: list[str]) -> Target:
    metadata = read_metadata(path)
    if metadata is None:
        raise ConfigError(
            f"{path} is not an export of this trainer, which would say what network it is of: name the network and "
            f"give the file, as timm:NAME model.weights={path}"
        )
    config = configfile.load(None, [*metadata["config"], *overrides])
    return Target(name=str(path), config=config, weights=path, classes=_classes(path))


def read_metadata(path: Path) -> dict[str, Any] | None:
    """What our export wrote into the safetensors file at `path`; None if it is another's. ConfigError if unreadable."""
    try:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA)
        return json.loads(text) if text else None
    except ImportError as error:
        raise ConfigError(f"{path} needs the package safetensors: pip install safetensors") from error
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: give a file of weights") from None
    except Exception as error:  # SafetensorError is not one of Python's own
        raise ConfigError(f"{path} is not a readable safetensors file ({' '.join(str(error).split())})") from error


def other_pixels(config: Config) -> str | None:
    """What to say where model.weights were trained on images normalised otherwise; None if not, or nobody knows."""
    weights = Path(config.model.weights) if config.model.weights else None
    if weights is None:
        return None
    if weights.suffix == ".safetensors":
        known = read_metadata(weights)
        trained = (known["mean"], known["std"]) if known else None
    elif (weights / "manifest.json").exists() and (weights.parent.parent / "config.yaml").exists():
        data = configfile.load(weights.parent.parent / "config.yaml", []).data
        trained = (data.mean, data.std)
    else:
        return None
    ours = (config.data.mean, config.data.std)
    if trained is None or [list(v) for v in trained] == [list(v) for v in ours]:
        return None
    words = " ".join(f"data.{key}={json.dumps(list(v))}" for key, v in zip(("mean", "std"), trained))
    return f"model.weights={weights} were trained on images normalised otherwise: {words} would do the same"


def _named(text: str, overrides: list[str]) -> Target:
    """A library's network; the images are made as its weights ask, unless overrides say otherwise.

    They are resized bilinearly even where the weights were made for bicubic images.
    """
    name, tag = pretrained.split(text)
    preset, classes = [f"model.name={name}"], None
    about = pretrained.about(name, tag)
    if about is not None:
        preset += [f"data.image_size={about.size}", f"data.mean={about.mean}", f"data.std={about.std}"]
        preset += [f"model.num_classes={about.classes}"]
        config = configfile.load(None, [*preset, *overrides])
        if not any(given.startswith("data.eval_resize=") for given in overrides):
            preset += [f"data.eval_resize={math.floor(config.data.crop_size / about.crop_ratio)}"]
        classes = about.names
    config = configfile.load(None, [*preset, *overrides])
    weights = config.model.weights
    if weights is None:
        if about is None:
            with torch.device("meta"):
                build.create(config.model, 1)  # a name that nobody knows is refused as such
            raise ConfigError(f"{text} has no weights of its own: add model.weights=FILE")
        return Target(name=text, config=config, tag=tag, classes=classes)
    if known := _classes(Path(weights)):  # one of our files, which may be of other classes than the library's
        config = configfile.load(None, [*preset, f"model.num_classes={len(known)}", *overrides])
    elif classes is not None and len(classes) == config.model.num_classes:
        known = classes
    return Target(name=weights, config=config, weights=Path(weights), tag=tag, classes=known)
