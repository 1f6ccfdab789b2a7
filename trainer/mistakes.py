"""What ends a run in one line, and the checks behind most of it."""

from __future__ import annotations

import sys
from typing import Any


class ConfigError(ValueError):
    """The user's mistake: one line that names the key or file, the value and the remedy; exit status 2."""

    everywhere = True  # every rank meets it; False: only the rank that raises it knows


class RunError(RuntimeError):
    """What a run cannot go on with, though nobody made a mistake: one line; exit status 1."""

    everywhere = True


def warn(text: str) -> None:
    """Say in one line what is wrong though the run goes on."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def one_of(key: str, value: Any, valid: tuple[Any, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"{key}={value} is not known; use one of: {', '.join(str(v) for v in valid)}")


def at_least(key: str, value: float | None, least: float, *, strictly: bool = False) -> None:
    if value is not None and (value <= least if strictly else value < least):
        raise ConfigError(f"{key}={value} is too small; it must be {'above' if strictly else 'at least'} {least}")


def share(key: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{key}={value} is not a share; it must lie between 0 and 1")


def pair(key: str, value: list[float], *, least: float = 0.0) -> None:
    if len(value) != 2 or not least < value[0] <= value[1]:
        raise ConfigError(f"{key}={value} is not a range; write two numbers above {least:g}, the smaller first")
