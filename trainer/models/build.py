"""From options to a model: ours, timm's or torchvision's; and its weights.

In the order of a run: `create`, `load_weights`, and parallel.py; and `unwrap` wherever the bare module is wanted.
"""

from __future__ import annotations

import difflib
import typing
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.config import ConfigError, Model
from trainer.models.blurpool import antialias
from trainer.models.resnet import FAMILY, ResNet
from trainer.models.start import head, set_start

if TYPE_CHECKING:
    pass

_PREFIXES = ("module.", "_orig_mod.")  # left in the keys by DDP and torch.compile


def create(options: Model, num_classes: int) -> nn.Module:
    """The network that `options` describe, initialised, on the CPU (or the default device), in training mode.

    It maps images (N, 3, H, W) to logits (N, num_classes). `options.name` is a key of FAMILY, `timm:NAME` or
    `torchvision:NAME`; a foreign builder keeps its own default where an option of ours is 0 or False. `num_classes`
    is settled by the caller, and `options.weights` is left to `load_weights`. Raises ConfigError for an unknown name
    and for an option that the network does not have.
    """
    model = _create(options, num_classes)
    if options.blurpool != "none":
        antialias(model, pooling=options.blurpool == "all")
    set_start(options, model, num_classes)
    return model


def _create(options: Model, num_classes: int) -> nn.Module:
    if options.name in FAMILY:
        return ResNet(options, num_classes)
    library, _, name = options.name.partition(":")
    if name and library == "timm":
        return _create_timm(options, name, num_classes)
    if name and library == "torchvision":
        return _create_torchvision(options, name, num_classes)
    raise _unknown(options.name, FAMILY, f"ours are {', '.join(FAMILY)}; others are timm:NAME and torchvision:NAME")


def _unknown(name: str, known: Iterable[str], remedy: str, prefix: str = "") -> ConfigError:
    nearest = difflib.get_close_matches(name.removeprefix(prefix), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(prefix + near for near in nearest)}? " if nearest else ""
    return ConfigError(f"model.name={name} is not known: {hint}{remedy}")


def _create_timm(options: Model, name: str, num_classes: int) -> nn.Module:
    import timm

    # is_model also keeps out hub addresses, which would reach for the network.
    if not timm.is_model(name):
        raise _unknown(options.name, timm.list_models(), "timm.list_models() names them all", "timm:")
    _refuse_ours(options)
    extra = {key: getattr(options, key) for key in ("drop_rate", "drop_path_rate") if getattr(options, key)}
    if options.zero_init_residual:
        extra["zero_init_last"] = True
    return _call(options, lambda: timm.create_model(name, pretrained=False, num_classes=num_classes, **extra))


def _create_torchvision(options: Model, name: str, num_classes: int) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)  # the classifiers alone; detection, video and so on have other modules
    if name not in known:
        raise _unknown(options.name, known, "torchvision.models.list_models() names them all", "torchvision:")
    _refuse_ours(options)
    # Builders take **kwargs, and some classes swallow what they do not know, so only the names in the signature count.
    network = typing.get_type_hints(models.get_model_builder(name))["return"]
    accepted = typing.get_type_hints(network.__init__)
    extra: dict[str, Any] = {}
    for key, spellings in (
        ("drop_rate", ("dropout", "drop_rate")),
        ("drop_path_rate", ("stochastic_depth_prob",)),
        ("zero_init_residual", ("zero_init_residual",)),
    ):
        if getattr(options, key):
            spelling = next((s for s in spellings if s in accepted), None)
            if spelling is None:
                raise _not_taken(options, [key])
            extra[spelling] = getattr(options, key)
    if "aux_logits" in accepted:  # googlenet and inception_v3: the training loop has one loss, so one head
        extra |= {"aux_logits": False, "init_weights": True}
    return _call(options, lambda: models.get_model(name, weights=None, num_classes=num_classes, **extra))


def _refuse_ours(options: Model) -> None:
    default = Model()
    for key in ("variant", "residual", "shortcut", "conv_init"):
        if getattr(options, key) != getattr(default, key):
            raise _not_taken(options, [key])


def _not_taken(options: Model, keys: list[str], reason: str = "") -> ConfigError:
    given = ", ".join(f"model.{key}={getattr(options, key)}" for key in keys)
    return ConfigError(
        f"{given}: model.name={options.name} does not take {'this' if len(keys) == 1 else 'all of these'}"
        f"{reason and f' ({reason})'}; leave out {' and '.join(f'model.{key}' for key in keys)}"
    )


def _call(options: Model, build: Callable[[], nn.Module]) -> nn.Module:
    """Builds a foreign model; an option it has no parameter for ends as a TypeError of its constructor."""
    try:
        return build()
    except TypeError as error:
        keys = [key for key in ("drop_rate", "drop_path_rate", "zero_init_residual") if getattr(options, key)]
        if not keys:
            raise
        raise _not_taken(options, keys, str(error)) from error
    except RuntimeError as error:  # timm: a pretrained tag that does not exist
        raise ConfigError(f"model.name={options.name} cannot be built: {error}") from error


def load_weights(
    model: nn.Module, path: str | Path, *, new_head: bool = False, ema: bool = False, key: str = "model.weights"
) -> None:
    """Loads a file of weights into `model`, in place and strictly: every key, and every shape.

    With `new_head` the head stays as it is, whatever the file has for one; with `ema` the average that one of our
    checkpoints holds is taken instead of the raw weights. `key` is the option that names the file.

    `path` is a file of torch.save or safetensors that holds a state dict, bare or under "model" or "state_dict", or a
    folder with such a `state.pt`, as our checkpoints are. The keys may begin with "module." or "_orig_mod.". Only
    tensors and plain values are unpickled. Raises ConfigError, in one line, for whatever does not fit.
    """
    model = unwrap(model)
    where = f"{key}={path}"
    read = _read(Path(path), where)
    state = {_strip(key): value for key, value in _state_dict(read["ema"] if ema else read, where).items()}
    wanted = model.state_dict()
    if new_head:
        last = head(model)
        (name,) = (name for name, module in model.named_modules() if module is last)
        state |= {key: value for key, value in wanted.items() if key.startswith(f"{name}.")}
    # PyTorch before 0.4.1 did not count batches; load_state_dict lets the counter start from 0 then.
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in wanted]
    if missing or unexpected:
        parts = [f"{what} {_first(keys)}" for what, keys in (("lacks", missing), ("has also", unexpected)) if keys]
        raise ConfigError(f"{where} is of another network: it {' and '.join(parts)}; set model.name and its options")
    wrong = [key for key in state if state[key].shape != wanted[key].shape]
    if wrong:
        raise ConfigError(f"{where} {_shape_mismatch(wrong, state, wanted)}")
    model.load_state_dict(state, strict=True)


def has_ema(path: str | Path) -> bool:
    """Whether the checkpoint or file of weights at `path` holds averaged weights beside the raw ones."""
    read = _read(Path(path), str(path))
    return isinstance(read, dict) and isinstance(read.get("ema"), dict)


def _read(path: Path, where: str) -> Any:
    if path.is_dir():
        path = path / "state.pt"
        where = f"{where}: {path.name}"
    if not path.is_file():
        raise ConfigError(f"{where} does not exist: give a file of weights, or a checkpoint folder with a state.pt")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # Only torch's zip format can be mapped; the one before 1.6 is read whole.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except ImportError as error:
        raise ConfigError(f"{where} needs the package safetensors: pip install safetensors") from error
    except Exception as error:  # a damaged file can raise anything, from pickle, zipfile or torch
        detail = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        raise ConfigError(
            f"{where} is not a readable file of weights ({type(error).__name__}: {detail}); "
            "write one with torch.save(model.state_dict(), PATH)"
        ) from error


def _state_dict(loaded: Any, where: str) -> dict[str, Tensor]:
    """The state dict in what was read: itself, or one level down."""
    if isinstance(loaded, dict):
        for candidate in (loaded, loaded.get("model"), loaded.get("state_dict")):
            if isinstance(candidate, dict) and candidate and all(isinstance(v, Tensor) for v in candidate.values()):
                return candidate
    held = f"the keys {_first([str(key) for key in loaded])}" if isinstance(loaded, dict) else type(loaded).__name__
    raise ConfigError(f'{where} holds no state dict, bare or under "model" or "state_dict", but {held}')


def _strip(key: str) -> str:
    while key.startswith(_PREFIXES):
        key = key.partition(".")[2]
    return key


def _first(keys: list[str]) -> str:
    return f"{len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"


def _shape_mismatch(wrong: list[str], state: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """What to say of a file whose keys fit and whose shapes do not: usually its head is for other classes."""
    # A head differs in its outputs alone, and its weight and bias differ alike; a width differs on both sides.
    same_inputs = all(state[key].shape[1:] == wanted[key].shape[1:] for key in wrong)
    outputs = {(state[key].shape[:1], wanted[key].shape[:1]) for key in wrong}
    if same_inputs and len(outputs) == 1:
        ((theirs,), (ours,)) = outputs.pop()
        return (
            f"has {theirs} classes ({wrong[0]}) and the model has {ours}: set model.num_classes={theirs} to use it as "
            f"it is; to fine-tune on {ours} classes set model.new_head=true"
        )
    shapes = [f"{key} {tuple(state[key].shape)} for {tuple(wanted[key].shape)}" for key in wrong]
    return f"is of another network: shapes differ in {_first(shapes)}; set model.name and its options"


def unwrap(model: nn.Module) -> nn.Module:
    """The bare module inside DDP and torch.compile, in either order; the module itself when it is bare."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = typing.cast(nn.Module, model._orig_mod)
        else:
            return model
