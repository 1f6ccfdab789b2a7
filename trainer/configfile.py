"""From YAML files and `key=value` to a Config.

A CONFIG file holds only what differs from the defaults; `base: other.yaml` inherits from another file, relative to it.
Precedence: defaults, base, file, then `key=value` from the command line. An unknown key is refused with the nearest
valid ones.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config import Config, ConfigError

FREE_FORM = ("loop.stop_at.", "published.error.")  # what follows is the user's, and the section checks it
Schema = TypeVar("Schema")


def load(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read CONFIG with its bases, then `key=value` on top; ConfigError names whatever is wrong."""
    return load_as(Config, path, overrides)


def load_as(schema: type[Schema], path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Schema:
    """Read a file of the options of `schema`, a dataclass, as `load` reads a Config."""
    merged = OmegaConf.structured(schema)
    for source, layer in [*(_layers(Path(path)) if path else []), *map(_override, overrides)]:
        _refuse_unknown(layer, source, schema)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(_wrong_type(error, source)) from error
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_wrong_type(error, str(path))) from error
    assert isinstance(config, schema)  # noqa: S101 (ours, not the user's: to_object returns the structured type)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionaries of every option, for JSON, a checkpoint or W&B."""
    return dataclasses.asdict(config)


def flat(config: Config) -> dict[str, Any]:
    """Every option by its dotted key."""
    found: dict[str, Any] = {}
    for key, value in to_dict(config).items():
        found |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    return found


def to_yaml(config: Config) -> str:
    """Every option, resolved, as YAML that `load` reads back to an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def _layers(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, DictConfig]]:
    """The file and the files it is based on, the deepest base first."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base leads back to itself: {' -> '.join(str(p) for p in (*seen, path))}")
    try:
        layer = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; the recipes are in configs/") from None
    except Exception as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{path}: must hold keys and values, not {type(layer).__name__}")
    base = layer.pop("base", None)
    below = _layers(path.parent / str(base), (*seen, path.resolve())) if base is not None else []
    return [*below, (str(path), layer)]


def _override(text: str) -> tuple[str, DictConfig]:
    """One `key=value` of the command line."""
    key, equals, _ = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{text!r} is not key=value, for example optim.lr=0.1")
    try:
        return text, OmegaConf.from_dotlist([text])
    except Exception as error:
        raise ConfigError(f"{text!r}: the value is not readable as YAML: {' '.join(str(error).split())}") from error


def _refuse_unknown(layer: DictConfig, source: str, schema: type) -> None:
    structure = OmegaConf.structured(schema)
    known = _keys(structure)
    sections = [key for key in structure if isinstance(structure._get_node(key), DictConfig)]
    free = [key for key in sections if not structure[key]]  # a plain mapping, whose keys are the user's
    for key in _keys(layer):
        if key in sections and not isinstance(layer[key], DictConfig):
            raise ConfigError(f"{source}: {key} is a section, not a value; write {key}.NAME=VALUE")
        if key in known or key.split(".")[0] in free or key.startswith(FREE_FORM):
            continue
        # A typo may sit in the section as well as in the name, so both the whole key and its last part are compared.
        last = {k: k.rsplit(".", 1)[-1] for k in known}
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
        near += [k for k in known if last[k] == key.rsplit(".", 1)[-1] and k not in near]
        section = [k for k in known if "." in key and k.startswith(key.rsplit(".", 1)[0] + ".")]
        hint = near or section or [k for k in known if "." not in k]
        raise ConfigError(f"{source}: there is no option {key}; did you mean {', '.join(hint[:8])}?")


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    found: list[str] = []
    for key in config:
        node = config._get_node(key)
        name = f"{prefix}{key}"
        found += [name]
        if isinstance(node, DictConfig) and not node._is_none():
            found += _keys(node, f"{name}.")
    return found


def _wrong_type(error: OmegaConfBaseException, source: str) -> str:
    if isinstance(error.__cause__, ConfigError):
        return str(error.__cause__)
    first = str(error).strip().splitlines()[0]
    key = error.full_key or ""
    return f"{source}: {key}: {first}" if key and key not in first else f"{source}: {first}"
